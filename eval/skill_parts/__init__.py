"""The parts of eval/skills.py: texts, likelihoods of labels, merges, the numbers' arithmetic, the record."""

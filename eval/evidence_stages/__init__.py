"""The stages of `eval/evidence.py`: what is trained and measured, in YAML files, and how those are read and kept."""

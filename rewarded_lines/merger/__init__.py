"""The merge: methods, LiNeS schedule, checks, plans, LoRA, output, record, model card, inspection, mergekit's files."""

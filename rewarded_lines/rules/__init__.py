"""Merge rules on tensors, the LiNeS schedule over depth, preferences: numbers in, numbers out."""

"""Rows of data from files or the Hub, checked against declared roles, and prompts as texts and as tokens."""

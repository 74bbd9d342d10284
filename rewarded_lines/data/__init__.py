"""Rows of data with declared roles, from files or the Hub, and prompts as texts and tokens."""

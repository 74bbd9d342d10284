"""Configs of other tools, said in this one's terms."""

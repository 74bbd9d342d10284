"""Prompts of nvidia/HelpSteer3, subset `preference`: `context`, the turns of a chat that ends with the user's."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]


def prompts(row: Row) -> Row | None:
    """Return the chat, if it is a general one in English; other domains are code, STEM and other languages."""
    return {"prompt": row["context"]} if row["domain"] == "general" else None

"""Rows of nvidia/HelpSteer3, subset `preference`, in our roles.

A row of the data: `context`, the turns of a chat that ends with the user's; `response1` and `response2`; and
`overall_preference` from -3 (the first is much better) to 3 (the second is much better).
"""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]


def preferences(row: Row) -> Row | None:
    """Return the chat with its better and its worse answer; None if they are about the same."""
    preference = int(row["overall_preference"])
    answers = [row["response1"], row["response2"]]
    if preference == 0 or not all(answers):
        return None
    better = int(preference > 0)
    return {"prompt": row["context"], "chosen": answers[better], "rejected": answers[1 - better]}


def prompts(row: Row) -> Row | None:
    """Return the chat, if it is a general one in English; other domains are code, STEM and other languages."""
    return {"prompt": row["context"]} if row["domain"] == "general" else None

"""Rows of HuggingFaceH4/ultrafeedback_binarized in our roles.

A row of the data: `prompt`, the question as a text; `chosen` and `rejected`, chats that begin with it.
"""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]


def prompts(row: Row) -> Row | None:
    """Return the turns before the last answer; None if an answer is empty, as a few of the data are."""
    *before, last = row["chosen"]
    return {"prompt": before} if before and last["content"].strip() else None

"""Rows of PKU-Alignment/PKU-SafeRLHF-10K in our roles: the pair for each of its two preferences.

A row of the data: `prompt`, two answers `response_0` and `response_1`, and which of them is the more helpful
(`better_response_id`) and which the safer one (`safer_response_id`), judged apart.
"""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]


def helpful(row: Row) -> Row | None:
    """Return the more helpful answer against the other one."""
    return _pair(row, "better_response_id")


def harmless(row: Row) -> Row | None:
    """Return the safer answer against the other one."""
    return _pair(row, "safer_response_id")


def prompts(row: Row) -> Row:
    """Return the question."""
    return {"prompt": row["prompt"]}


def _pair(row: Row, judged: str) -> Row | None:
    """Return a pair; None if both answers are the same, or one is empty."""
    better = int(row[judged])
    chosen, rejected = row[f"response_{better}"].strip(), row[f"response_{1 - better}"].strip()
    if not chosen or not rejected or chosen == rejected:
        return None
    return {"prompt": row["prompt"], "chosen": chosen, "rejected": rejected}

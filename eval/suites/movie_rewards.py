"""Rewards of the movie review suite that are plain functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

LONGEST = 20


def whole(row: Mapping[str, str]) -> dict[str, str]:
    """Return a review with its beginning, as one text."""
    return {"text": row["prompt"] + row["completion"]}


def detailed(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Return the number of words of each response, at most 20: longer reviews say more, up to a point."""
    return [float(min(len(response.split()), LONGEST)) for response in responses]

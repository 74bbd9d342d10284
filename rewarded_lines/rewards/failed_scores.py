"""Scores that never came: what stands in their place, and the error that names their pairs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rewarded_lines.data.prompts import Prompt
from rewarded_lines.errors import UserError, fail, listed

_MOST_REASONS, _MOST_ROWS, _SHOWN = 3, 4, 40


@dataclass(frozen=True)
class Failed:
    """In the place of a score: the reward failed on the pair, after all attempts.

    Attributes:
        words: what happened, such as a status and the server's own words.
        where: the server, for instance.
        remedy: what helps where asking again does not.
    """

    words: str
    where: str = ""
    remedy: str = ""


def rows_failed(
    name: str,
    failed: Mapping[int, Failed],
    prompts: Sequence[Prompt],
    responses: Sequence[str],
    remedy: str = "mend what the server says; a training needs every score, `missing: leave_out` is for sweeps",
) -> UserError:
    """Return the error for a reward without scores for some of the pairs; `failed` has their places."""
    rows: dict[str, list[str]] = defaultdict(list)
    for at, one in sorted(failed.items()):
        rows[one.words].append(f"prompt {at}: {_short(prompts[at])} → {_short(responses[at])}")
    where = next(iter(failed.values())).where
    own = next((one.remedy for one in failed.values() if one.remedy), "")
    return fail(
        f"no score for {len(failed):,} of {len(prompts):,} responses, after all attempts",
        where=f"reward `{name}`" + (f", {where}" if where else ""),
        expected="a score for each, or null where the reward has no say",
        got=listed([f"{words} ({listed(some, _MOST_ROWS)})" for words, some in rows.items()], _MOST_REASONS),
        remedy=own or remedy,
    )


def _short(text: Any) -> str:
    shown = repr(text)
    return shown if len(shown) <= _SHOWN else f"{shown[: _SHOWN - 1]}…"

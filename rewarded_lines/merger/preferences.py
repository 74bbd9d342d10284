"""Preferences: weights over policies, read from text and laid out as grids. Pure numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from rewarded_lines.errors import Problem, UserError

TOLERANCE = 1e-6


def parse_weights(
    text: str, policies: Sequence[str], extrapolate: bool = False, total: bool = True
) -> tuple[float, ...]:
    """Return one weight per policy.

    Args:
        text: one number λ for one or two policies (the first policy's weight; the second gets 1 − λ), or
            `0.2,0.3,0.5` for any number.
        policies: their names, in order.
        extrapolate: allow weights outside 0 … 1 and sums other than 1.
        total: whether the sum must be 1.

    Raises:
        UserError: not numbers, a wrong number of them, negative ones, or a sum other than 1.
    """
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = [math.nan]
    if len(values) == 1 and len(policies) == 2:
        # Round: 1 − 0.9 is 0.09999999999999998 in binary.
        values = [values[0], round(1 - values[0], 12)]
    return check_weights(values, policies, extrapolate, text, total)


def check_weights(
    weights: Sequence[float], policies: Sequence[str], extrapolate: bool = False, text: str = "", total: bool = True
) -> tuple[float, ...]:
    """Return `weights` as a tuple; see `parse_weights` for what is refused.

    Args:
        weights: one for each policy.
        policies: their names, in order.
        extrapolate: allow weights outside 0 … 1 and sums other than 1.
        text: what the user wrote, for the message.
        total: whether the sum must be 1.
    """
    text = text or ",".join(str(weight) for weight in weights)
    if not all(math.isfinite(weight) for weight in weights):
        raise UserError(_problem(text, "not a weight", "a number such as 0.5, or 0.2,0.3,0.5"))
    problems = []
    if len(weights) != len(policies):
        expected = f"{len(policies)} weights, for {', '.join(policies)}"
        problems.append(_problem(text, f"{len(weights)} weights for {len(policies)} policies", expected))
    elif not extrapolate:
        remedy = "pass --extrapolate if you mean to leave the simplex"
        if any(not 0 <= weight <= 1 for weight in weights):
            problems.append(_problem(text, "a weight lies outside 0 to 1", "0 ≤ λ ≤ 1", remedy))
        if total and abs(sum(weights) - 1) > TOLERANCE:
            problems.append(_problem(text, "the weights do not sum to 1", "a sum of 1", remedy))
    if problems:
        raise UserError(problems)
    return tuple(float(weight) for weight in weights)


def on_simplex(weights: Sequence[float]) -> bool:
    """Say whether weights are ≥ 0 and sum to 1."""
    return min(weights) >= 0 and abs(math.fsum(weights) - 1) <= TOLERANCE


def simplex_grid(policies: int, points: int) -> list[tuple[float, ...]]:
    """Return every weight vector whose entries are multiples of 1/(points − 1), in lexical order.

    For two policies these are `points` equally spaced λ from 0 to 1, as (λ, 1 − λ); the corners are exact.

    Args:
        policies: N ≥ 1, the length of each vector.
        points: ≥ 2, how many lie on each edge of the simplex.
    """
    steps = points - 1
    return [tuple(part / steps for part in parts) for parts in _compositions(steps, policies)]


def _compositions(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    """Yield the ways to write `total` as an ordered sum of `parts` integers ≥ 0."""
    if parts == 1:
        yield (total,)
        return
    for first in range(total + 1):
        for rest in _compositions(total - first, parts - 1):
            yield (first, *rest)


def folder_name(weights: Sequence[float]) -> str:
    """Return the folder of one output among several: `lam=0.25` for two policies, else `lam=0.20,0.30,0.50`."""
    one_number = len(weights) == 2 and abs(sum(weights) - 1) <= TOLERANCE
    shown = weights[:1] if one_number else weights
    return "lam=" + ",".join(f"{weight:.2f}" if round(weight, 2) == weight else repr(weight) for weight in shown)


def _problem(text: str, what: str, expected: str, remedy: str = "") -> Problem:
    return Problem(what, where=f"--lam {text}", expected=expected, got=text, remedy=remedy)

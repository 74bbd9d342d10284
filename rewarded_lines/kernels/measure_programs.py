"""Programs that count and add: each is noted by residuals, as symbols; see `rule_programs`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from rewarded_lines.kernels.rule_programs import Notes

# How many values are summed apart from others: those of the innermost loop of numpy's sums.
SUMMED = 128


def note_between(notes: Notes, values: Sequence[Any], bounds: int, ends: bool = True, zeros: bool = True) -> None:
    """Note what `numpy_kernels.count_between` counts.

    The targets are, for each of the bounds: how many sizes are between, below the upper, above it, and equal to the
    lower; then the sizes between, of each of the bounds; and how many of the first values are 0. Without `ends` and
    `zeros` the last two of each, and the last of all, are not counted: that takes half the comparisons.
    """
    sizes = [abs(value) for value in values]
    for row in range(bounds):
        size, (low, high, other) = sizes[row % len(sizes)], (notes.symbol("factor", 3 * row + k) for k in range(3))
        below = size < high
        inside = (size > low) & below
        for place, each in enumerate((below, *((size > high, size == other) if ends else ())), start=1):
            notes.symbol("count", 4 * row + place, each.place)
        notes.symbol("collect", 4 * row, 4 * bounds + row, inside.place, size.place)
    if zeros:
        notes.symbol("count", 5 * bounds, (sizes[0] == 0.0).place)


def factors_between(bounds: Sequence[tuple[float, float]]) -> list[float]:
    """Return the factors of `note_between`."""
    # The lower bound again, if it is another: nothing equals NaN.
    return [each for low, high in bounds for each in (low, high, low if low < high else math.nan)]


def note_overlaps(notes: Notes, values: Sequence[Any]) -> None:
    """Note how many sizes above a factor several of the values have, and then how many each has."""
    sizes = [abs(value) for value in values]
    masks = [size > notes.symbol("factor", 0) for size in sizes]
    # Nothing is below itself.
    some, several = masks[0], masks[0] < masks[0]
    for mask in masks[1:]:
        some, several = some | mask, several | (some & mask)
    for row, mask in enumerate(masks):
        notes.symbol("count", row, (mask & several).place)
        notes.symbol("count", len(masks) + row, mask.place)


def note_squares(notes: Notes, values: Sequence[Any], measured: Callable[[Sequence[Any]], Any]) -> None:
    """Note the sums of the squares of each of the values where what is measured of all is at least a factor."""
    measure = measured(values)
    notes.symbol("finite", measure.place)
    selected = measure >= notes.symbol("factor", 0)
    for row, value in enumerate(values):
        chosen = value * selected
        notes.symbol("sum", row, (chosen * chosen).place)

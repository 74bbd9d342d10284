"""Magnitudes between bounds: one pass counts what is above them, and keeps what is between."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from rewarded_lines.kernels import numpy_kernels
from rewarded_lines.kernels.blocks import Array, Workspace
from rewarded_lines.kernels.magnitudes import HELD, Magnitudes, largest
from rewarded_lines.kernels.measures import RUN, SPARE, factors_between, measure, note_between
from rewarded_lines.kernels.rule_programs import Notes
from rewarded_lines.kernels.tensor_merge import TensorMerge

# As many values that equal the bounds are kept with those between.
_TIED = 1 << 18


class Bounds(NamedTuple):
    """Two magnitudes, and about which share of all values lies between them, and equals one of them."""

    low: float
    high: float
    share: float
    tied: float = 0.0


class _Between:
    """Counts the values of one thread by their bounds, and keeps those between; see `numpy_kernels.count_between`.

    Attributes:
        counts: of each of the bounds: values above, equal to the upper, and equal to the lower.
        parts: the values between.
        zeros: how many values of the first row are 0.
    """

    def __init__(self, bounds: Sequence[tuple[float, float]], ends: bool, rule: TensorMerge | None) -> None:
        self.counts, self.zeros = np.zeros((len(bounds), 3), np.int64), 0
        self.parts: list[list[Array]] = [[np.empty(0)] for _ in bounds]
        self._bounds, self._ends, self._rule = bounds, ends, rule
        self._run, self._none = np.zeros((len(bounds), 4), np.int64), np.zeros(1, np.int64)
        # Memory is given for what is written.
        self._between = np.empty((len(bounds), RUN + SPARE))
        self.targets = [*self._run.reshape(-1, 1), *self._between, self._none]

    def take(self, count: int) -> None:
        """See `Counter`."""
        found = [(inside, above, count - below - above, bottom) for inside, below, above, bottom in self._run.tolist()]
        self._add(found, int(self._none[0]))

    def clear(self) -> None:
        """See `Counter`."""
        self._run[:], self._none[:] = 0, 0

    def look(self, workspace: Workspace) -> None:
        """See `Counter`."""
        values = workspace.merged_residuals([self._rule]) if self._rule else ()
        pairs = [(workspace.nothing(), row) for row in values] or workspace.pairs()
        with np.errstate(all="ignore"):
            self._add(*numpy_kernels.count_between(pairs, self._bounds, list(self._between)))

    def _add(self, found: Sequence[tuple[int, ...]], none: int) -> None:
        self.zeros += none
        for (number, above, top, bottom), count, parts, between in zip(
            found, self.counts, self.parts, self._between, strict=True
        ):
            count += (above, top, bottom) if self._ends else (above + top, 0, 0)
            parts.append(between[:number].copy())


def ranked_between(
    values: Magnitudes, bounds: Sequence[Bounds], wanted: Callable[[int], list[int]]
) -> tuple[float, ...] | list[int]:
    """Return the value of each bound's rank; or the ranks, if a value is not within its bounds, or too many values are.

    Bounds are of the rows in turn, which may come several times. `wanted` gives their ranks by the zeros of the first.
    """
    if sum(bound.share for bound in bounds) * values.total > HELD:
        bounds = [Bounds(math.inf, math.inf, 0.0)] * len(bounds)
    rule, limits, counters = values.rule, [(low, high) for low, high, *_ in bounds], list[_Between]()
    # Where few values equal the bounds, these are moved outwards, and need no counts of their own.
    ends = sum(bound.tied for bound in bounds) * values.total > _TIED
    if not ends:
        limits = [(math.nextafter(low, -1), math.nextafter(high, math.inf)) for low, high in limits]

    def note(notes: Notes, residuals: Sequence[Any]) -> None:
        values = residuals
        if rule:
            values = [rule.residual([residuals[row] for row in rule.rows], ())]
            notes.symbol("finite", values[0].place)
        note_between(notes, values, len(limits), ends, zeros=rule is not None)

    def begin() -> _Between:
        counters.append(_Between(limits, ends, rule))
        return counters[-1]

    measure(values.base, values.policies, values.names, values.threads, begin, note, factors_between(limits))
    ranks, found = wanted(sum(each.zeros for each in counters)), []
    counts = sum((each.counts for each in counters), np.zeros((len(bounds), 3), np.int64))
    for row, (rank, bound, (above, top, bottom)) in enumerate(zip(ranks, bounds, counts, strict=True)):
        held, place = np.concatenate([part for each in counters for part in each.parts[row]]), rank - above
        if rank == 0 or place <= 0 or place > top + held.size + bottom:
            return ranks
        inside = top < place <= top + held.size
        found.append(largest(held, place - top) if inside else bound.high if place <= top else bound.low)
    return tuple(found)

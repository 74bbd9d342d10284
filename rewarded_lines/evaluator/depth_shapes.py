"""Shapes over relative depth: a few numbers at knots give the scale of every block.."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rewarded_lines.evaluator.weight_designs import Weights
from rewarded_lines.merger.lines_schedule import Line
from rewarded_lines.merger.spec import MergeSpec


@dataclass(frozen=True)
class ShapeSpace:
    """The shapes that a search chooses from.

    Attributes:
        kind: "linear" between knots, or a natural cubic "spline" through them.
        knots: how many, at least 2, equally spaced from the first block to the last.
        curves: 1 for all policies, or their number.
        most: the largest scale; the smallest is 0.
    """

    kind: str
    knots: int
    curves: int
    most: float

    def scales(self, numbers: Sequence[float], blocks: int) -> list[list[float]]:
        """Return each curve's scale of every block, first to last, in steps of 1/10,000.

        Args:
            numbers: the scales at the knots, curve by curve.
            blocks: L; block ℓ lies at depth (ℓ−1)/(L−1), the only one of L = 1 at 0.
        """
        rows, depths = np.reshape(numbers, (self.curves, self.knots)), np.linspace(0.0, self.knots - 1.0, blocks)
        through = natural_spline if self.kind == "spline" else _polyline
        # Between its knots, a spline may leave the range.
        return [np.clip(through(row, depths), 0.0, self.most).round(4).tolist() for row in rows]

    def straight(self, alpha: float, beta: float) -> list[float]:
        """Return the numbers of LiNeS with α and β for all curves, inside the range."""
        line = np.clip(alpha + beta * np.linspace(0.0, 1.0, self.knots), 0.0, self.most)
        return np.tile(line.round(2), self.curves).tolist()


def natural_spline(heights: NDArray[np.float64], depths: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the natural cubic spline through heights at 0, 1, 2 …, at depths between.

    S(x) = y_i·v + y_(i+1)·u + (m_i·(v³ − v) + m_(i+1)·(u³ − u))/6 with u = x − i, v = 1 − u, second derivatives m = 0
    at both ends, and m_(i−1) + 4·m_i + m_(i+1) = 6·(y_(i−1) − 2·y_i + y_(i+1)) inside.

    Source: de Boor, "A Practical Guide to Splines", 1978, chapter IV.
    """
    inside = len(heights) - 2
    bends = np.zeros(len(heights))
    if inside:
        system = 4 * np.eye(inside) + np.eye(inside, k=1) + np.eye(inside, k=-1)
        bends[1:-1] = np.linalg.solve(system, 6 * np.diff(heights, 2))
    left = np.minimum(depths.astype(int), inside)
    u = depths - left
    v = 1 - u
    curved = bends[left] * (v**3 - v) + bends[left + 1] * (u**3 - u)
    return np.asarray(heights[left] * v + heights[left + 1] * u + curved / 6)


def _polyline(heights: NDArray[np.float64], depths: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.interp(depths, np.arange(len(heights)), heights)


def shaped_merge(weights: Weights, scales: Sequence[Sequence[float]]) -> MergeSpec:
    """Return the soup with a scale for every block: one list for all policies, or one for each."""
    return MergeSpec(weights, lines=tuple(Line(blocks=tuple(one)) for one in scales))

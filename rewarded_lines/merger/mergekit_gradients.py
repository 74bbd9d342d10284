"""Numbers over depth, as mergekit writes them, split into weights λ and a LiNeS schedule. Pure.

mergekit evaluates a list of numbers at t = (ℓ−1)/(L−1), straight between neighbours, and at t = 0 outside the blocks. A
straight line over t is a LiNeS schedule, α its first value and α + β its last.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

_TOLERANCE = 1e-9


@dataclass(frozen=True)
class Line:
    """A number over depth: `first` in the first block and outside the blocks, `last` in the last block."""

    first: float
    last: float

    @property
    def constant(self) -> bool:
        """True if it is the same at every depth."""
        return self.first == self.last

    @property
    def beta(self) -> float:
        """The last value minus the first, in decimal: 1.6 − 0.7 is 0.9."""
        return float(Decimal(repr(self.last)) - Decimal(repr(self.first)))

    def times(self, factor: float) -> Line:
        """Return the line with both ends multiplied."""
        return Line(tidy(self.first * factor), tidy(self.last * factor))

    def __str__(self) -> str:
        """Return the line as mergekit writes it."""
        return f"{self.first:g}" if self.constant else f"[{self.first:g}, {self.last:g}]"


@dataclass(frozen=True)
class Product:
    """Coefficients c_i(t) = λ_i·s(t): one weight for each policy, one schedule for all."""

    weights: tuple[float, ...]
    schedule: Line


def line_of(setting: Any) -> Line | None:
    """Return the line of a number or of a list of numbers, None if it is neither or not straight."""
    given = setting if isinstance(setting, list) else [setting]
    numbers = [_as_number(value) for value in given]
    if not numbers or not all(map(math.isfinite, numbers)):
        return None
    line, steps = Line(numbers[0], numbers[-1]), max(1, len(numbers) - 1)
    straight = (line.first + (line.last - line.first) * place / steps for place in range(len(numbers)))
    size = max(map(abs, numbers))
    return line if all(_close(*pair, size) for pair in zip(straight, numbers, strict=True)) else None


def total(lines: Sequence[Line]) -> Line:
    """Return Σ_i w_i(t)."""
    return Line(sum(line.first for line in lines), sum(line.last for line in lines))


def multiply(one: Line, other: Line) -> Line | None:
    """Return the product, None if both change with depth: that is no line."""
    if not one.constant and not other.constant:
        return None
    return Line(tidy(one.first * other.first), tidy(one.last * other.last))


def normalized(lines: Sequence[Line]) -> list[Line] | None:
    """Return w_i(t)/Σ_j w_j(t), None if these are no lines or the sum has a zero."""
    whole = total(lines)
    if not whole.first * whole.last > 0:
        return None
    if _close(whole.first, whole.last, whole.first):
        return [line.times(1 / whole.first) for line in lines]
    found = factor(lines)
    return None if found is None else [Line(weight, weight) for weight in found.weights]


def factor(lines: Sequence[Line]) -> Product | None:
    """Return λ_i·s(t) equal to c_i(t), None if the ratios between policies change with depth.

    λ sums to 1, unless the c_i are constant or sum to 0; then λ keeps the size of the c_i.
    """
    if all(line.constant for line in lines):
        return Product(tuple(line.first for line in lines), Line(1.0, 1.0))
    ends = [[line.first for line in lines], [line.last for line in lines]]
    starts_at_zero = max(map(abs, ends[0])) <= _TOLERANCE * max(map(abs, ends[1]))
    anchor, other = ends[::-1] if starts_at_zero else ends
    largest = max(range(len(lines)), key=lambda index: abs(anchor[index]))
    ratio, size = other[largest] / anchor[largest], max(map(abs, anchor))
    if not all(_close(a * ratio, b, size) for a, b in zip(anchor, other, strict=True)):
        return None
    near, far = sum(anchor), sum(other)
    if abs(near) <= _TOLERANCE * size:
        near, far = 1.0, ratio
    schedule = Line(tidy(near), tidy(far)) if anchor is ends[0] else Line(tidy(far), tidy(near))
    return Product(tuple(tidy(value / near) for value in anchor), schedule)


def tidy(value: float) -> float:
    """Return a number without rounding noise in the last digit: 0.1 · 7 gives 0.7, and 1/3 is unchanged."""
    short = float(f"{value:.12g}")
    return short if abs(short - value) <= 4e-16 * abs(value) else value


def _as_number(value: Any) -> float:
    """Return a number, or NaN. As in mergekit, text such as 1e-3 is a number: YAML reads it as text."""
    try:
        return math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _close(one: float, other: float, size: float) -> bool:
    return abs(one - other) <= _TOLERANCE * abs(size)

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
    """A number that is `first` in the first block and outside the blocks, `last` in the last, straight between."""

    first: float
    last: float

    @property
    def constant(self) -> bool:
        """Whether it is the same at every depth."""
        return self.first == self.last

    @property
    def beta(self) -> float:
        """What the last block has more than the first, in decimal: 1.6 − 0.7 is 0.9."""
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
    """Return the line that a number or a list of numbers describes, None where it is neither or not straight."""
    given = setting if isinstance(setting, list) else [setting]
    numbers = [number for value in given if (number := _as_number(value)) is not None]
    if not given or len(numbers) < len(given):
        return None
    line, steps = Line(numbers[0], numbers[-1]), max(1, len(numbers) - 1)
    straight = (line.first + (line.last - line.first) * place / steps for place in range(len(numbers)))
    size = max(map(abs, numbers))
    return line if all(_close(*pair, size) for pair in zip(straight, numbers, strict=True)) else None


def total(lines: Sequence[Line]) -> Line:
    """Return Σ_i w_i(t)."""
    return Line(sum(line.first for line in lines), sum(line.last for line in lines))


def multiply(one: Line, other: Line) -> Line | None:
    """Return the product, None where both change with depth: it is no line."""
    if not one.constant and not other.constant:
        return None
    return Line(tidy(one.first * other.first), tidy(one.last * other.last))


def normalized(lines: Sequence[Line]) -> list[Line] | None:
    """Return w_i(t)/Σ_j w_j(t), None where these are no lines or the sum has a zero."""
    whole = total(lines)
    if not whole.first * whole.last > 0:
        return None
    if _close(whole.first, whole.last, whole.first):
        return [line.times(1 / whole.first) for line in lines]
    found = factor(lines)
    return None if found is None else [Line(weight, weight) for weight in found.weights]


def factor(lines: Sequence[Line]) -> Product | None:
    """Return c_i(t) taken apart into λ_i·s(t), None where the ratios between policies change with depth.

    λ sums to 1 unless the c_i do not change with depth or sum to 0; then λ keeps the size of the c_i.
    """
    if all(line.constant for line in lines):
        return Product(tuple(line.first for line in lines), Line(1.0, 1.0))
    ends = [[line.first for line in lines], [line.last for line in lines]]
    begins_at_nothing = max(map(abs, ends[0])) <= _TOLERANCE * max(map(abs, ends[1]))
    anchor, other = ends[::-1] if begins_at_nothing else ends
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
    """Return a number without the last digit's noise: 0.1 · 7 is 0.7, and 1/3 stays as it is."""
    short = float(f"{value:.12g}")
    return short if abs(short - value) <= 4e-16 * abs(value) else value


def _as_number(value: Any) -> float | None:
    """Return a number, also one that YAML takes for text (1e-3), as mergekit does."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _close(one: float, other: float, size: float) -> bool:
    return abs(one - other) <= _TOLERANCE * abs(size)

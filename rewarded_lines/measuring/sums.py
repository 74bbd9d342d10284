"""Sums without rounding on the way: the same for any order of their terms."""

from __future__ import annotations

import math
from collections.abc import Iterable


def exact_sum(terms: Iterable[float]) -> float:
    """Return the exact sum, rounded once; infinite or NaN, without complaint, where the terms are."""
    listed = list(terms)
    try:
        return math.fsum(listed)
    except (OverflowError, ValueError):
        # Past the largest float64 on the way, or infinities of both signs.
        return sum(listed)

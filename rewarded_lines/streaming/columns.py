"""The inner loop of stacked adapters: columns side by side, each with its factor, rounded once."""

from __future__ import annotations

from typing import Any

import numpy as np

from rewarded_lines.streaming.kernels import _store, _widen, compiled

Array = np.ndarray[Any, Any]


@compiled
def place_columns(values: Array, width: int, factor: float, first: int, columns: int, out: Array) -> int:
    """Write factor·values into some columns of a matrix; return how many of the results are not finite.

    Args:
        values: stored values, [rows, width], flat.
        width: of `values`.
        factor: what they are multiplied by, in float64.
        first: the column of the matrix that takes the first column of `values`.
        columns: of the matrix.
        out: the matrix in its storage type, [rows, columns], flat.
    """
    count = 0
    for row in range(values.size // width):
        source = values[row * width : (row + 1) * width]
        target = out[row * columns + first : row * columns + first + width]
        for i in range(width):
            count += _store(target, i, _widen(source[i]) * factor)
    return count

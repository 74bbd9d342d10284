"""The loops over values: numpy's at first, machine code once the work is long enough to load LLVM.

Both do the same operations in the same order and store every NaN as one pattern, so the bits do not depend on which is
used. `numpy_kernels` describes each loop.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np

from rewarded_lines.kernels import numpy_kernels

# Loading LLVM takes a tenth of a second. Numpy takes as long for so many values: 7 ns each in float32, 44 ns in
# bfloat16, where machine code takes 1 ns.
ENOUGH = 1 << 22
_seen = 0


@cache
def _module(name: str) -> Any:
    return import_module(f"rewarded_lines.kernels.{name}")


def is_long() -> bool:
    """Return whether this process has so much work that the compiler pays."""
    return _seen > ENOUGH


def machine_code() -> Any:
    """Return the module that translates programs."""
    return _module("machine_code")


def compiled_files() -> Any:
    """Return the module that reads files between loops of machine code."""
    return _module("compiled_files")


def expect(values: int) -> None:
    """Count values that will come: work that is known to be long starts with machine code."""
    global _seen
    _seen += values


def row_ranks() -> Any:
    """Return the module that ranks values."""
    return _module("row_ranks")


def _loop(
    name: str, counted: Callable[..., int] = lambda *given: given[0].size, module: str = "machine_kernels"
) -> Any:
    """Return the loop of this name; `counted` tells of its arguments how many values it goes over."""

    def call(*given: Any, **named: Any) -> Any:
        global _seen
        _seen += counted(*given)
        if _seen > ENOUGH:
            return getattr(_module(module), name)(*given, **named)
        with np.errstate(all="ignore"):
            return getattr(numpy_kernels, name)(*given, **named)

    return call


residual, cast, count_nonfinite = map(_loop, ("residual", "cast", "count_nonfinite"))
place_columns = _loop("place_columns")
count_magnitudes, collect_magnitudes = map(_loop, ("count_magnitudes", "collect_magnitudes"))
product = _loop("product", lambda *given: given[4].size)
rank_rows = _loop("rank_rows", module="row_ranks")

"""The loops over values: numpy's at first, the compiled ones once the work is long enough to load the compiler.

Both do the same operations in the same order and store every NaN as one pattern, so the bits do not depend on which is
used. `compiled_kernels` and `compiled_choices` describe each loop.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np

from rewarded_lines.kernels import numpy_kernels

# Loading numba takes a third of a second. Numpy takes half as long for so many values: 7 ns each in float32, 44 ns in
# bfloat16, where the compiled loop takes 1 ns.
ENOUGH = 1 << 22
_seen, _wide = 0, False


def use_wide_vectors() -> None:
    """Let numba use the processor's widest vectors in this process; call it before the first merge.

    On processors with 512 bits LLVM uses 256, because most code uses vectors rarely. The kernels use them all the time
    and take a third less time with 512. The user's own setting stays.
    """
    global _wide
    _wide = True


@cache
def _compiled(module: str) -> Any:
    if _wide and module != "compiled_sums":
        import numba

        sums = compiled_sums()
        if numba.config.CPU_FEATURES is None and (features := sums.cpu_features()).endswith(sums.WIDEST):
            numba.config.CPU_FEATURES = features
    return import_module(f"rewarded_lines.kernels.{module}")


def is_long() -> bool:
    """Return whether this process has so much work that the compiler pays."""
    return _seen > ENOUGH


def compiled_sums() -> Any:
    """Return the module of sums in machine code."""
    return _compiled("compiled_sums")


def expect(values: int) -> None:
    """Count values that will come: work that is known to be long starts with compiled loops."""
    global _seen
    _seen += values


def machine_code(operations: Any) -> int:
    """See `compiled_rules.machine_code`."""
    address: int = _compiled("compiled_rules").machine_code(operations)
    return address


def _loop(name: str, counted: int = 0, module: str = "compiled_kernels") -> Callable[..., Any]:
    """Return the loop of this name; its argument at the place `counted` tells how many values it goes over."""

    def call(*given: Any, **named: Any) -> Any:
        global _seen
        _seen += given[counted].size
        if _seen > ENOUGH:
            return getattr(_compiled(module), name)(*given, **named)
        with np.errstate(all="ignore"):
            return getattr(numpy_kernels, name)(*given, **named)

    return call


_linear, restore, residual, finish = map(_loop, ("linear", "restore", "residual", "finish"))
cast, count_nonfinite, place_columns = map(_loop, ("cast", "count_nonfinite", "place_columns"))
count_magnitudes, collect_magnitudes = map(_loop, ("count_magnitudes", "collect_magnitudes"))
_CHOICES = ("count_between", "count_overlaps", "keep_random", "draw_numbers", "keep_ranked")
count_between, count_overlaps, keep_random, draw_numbers, keep_ranked = (
    _loop(name, module="compiled_choices") for name in _CHOICES
)
merge_by_rules = _loop("merge_by_rules", module="compiled_rules")
product = _loop("product", counted=4)


def linear(base: Any, policies: Any, rows: Any, weights: Any, out: Any, counts: Any, first: int = 0) -> None:
    """See `compiled_kernels.linear`; finite sums of bfloat16 and float32 need no numba."""
    if _seen + base.size > ENOUGH:
        sums = compiled_sums()
        if sums.supports(base.dtype, out.dtype):
            chosen = [policies[row, first : first + base.size] for row in rows]
            if sums.linear(base, chosen, weights, out):
                expect(base.size)
                return
    _linear(base, policies, rows, weights, out, counts, first)

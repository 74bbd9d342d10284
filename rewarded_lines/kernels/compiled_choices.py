"""Compiled loops that choose values: by magnitude, and at random."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from rewarded_lines.kernels.compiled_kernels import Array, _widen, compiled

# Values that are looked at together: most groups have none to copy.
_GROUP = 64


@compiled
def _pattern(one: Any, other: Any) -> Any:
    """Return the bits of |one − other|, which grow with it; 0 where both are equal, infinities too."""
    return np.float64(abs(one - other) if one != other else 0.0).view(np.int64)


@compiled
def count_between(
    base: Array, policy: Array, low: float, high: float, found: Array
) -> tuple[int, tuple[int, int, int]]:
    """Copy the |τ| between two; return their number, and how many are above, equal to `high`, equal to `low`.

    If both are equal, these are counted as `high`.

    Args:
        base: n stored values.
        policy: n stored values; τ is their difference, and a NaN is above infinity.
        low: ≥ 0.
        high: ≥ low.
        found: takes the magnitudes between, at its front.
    """
    least, most = np.float64(low).view(np.int64), np.float64(high).view(np.int64)
    place = above = top = bottom = 0
    for start in range(0, base.size, _GROUP):
        one, other, between = policy[start : start + _GROUP], base[start : start + _GROUP], 0
        for i in range(one.size):
            pattern = _pattern(_widen(one[i]), _widen(other[i]))
            above += pattern > most
            top += pattern == most
            bottom += (pattern == least) & (least < most)
            between += (pattern > least) & (pattern < most)
        if between:
            for i in range(one.size):
                pattern = _pattern(_widen(one[i]), _widen(other[i]))
                if least < pattern < most:
                    found[place] = np.int64(pattern).view(np.float64)
                    place += 1
    return place, (above, top, bottom)


@intrinsic  # type: ignore[untyped-decorator]
def _product(_: Any, left: Any, right: Any) -> Any:
    """Return the upper and the lower 64 bits of the product of two uint64."""
    kind = types.UniTuple(types.uint64, 2)

    def write(context: Any, builder: Any, _: Any, factors: Any) -> Any:
        wide, narrow = ir.IntType(128), ir.IntType(64)
        product = builder.mul(*(builder.zext(factor, wide) for factor in factors))
        halves = builder.lshr(product, wide(64)), product
        return context.make_tuple(builder, kind, [builder.trunc(half, narrow) for half in halves])

    return kind(types.uint64, types.uint64), write


@compiled
def keep_random(out: Array, first: int, second: int, block: int, limit: int) -> None:
    """Fill `out` with booleans, each true with probability limit/2²⁴, by the generator Philox4x64-10.

    They are those of numpy's `Philox(key=[first, second], counter=[0, 0, block, 0])`: each 64 random bits give two
    numbers of 32 bits, the lower ones first, and the upper 24 of these decide.

    Args:
        out: n booleans, n a multiple of 8.
        first: a half of the key.
        second: the other half.
        block: the third word of the counter.
        limit: from 0 to 2²⁴.

    Source: Salmon and others, Parallel random numbers: as easy as 1, 2, 3, SC 2011, doi 10.1145/2063384.2063405.
    """
    bound, shift, half = np.uint64(limit), np.uint64(8), np.uint64(0xFFFFFFFF)
    one, other = np.uint64(0xD2E7470EE14C6C93), np.uint64(0xCA5A826395121157)
    for i in range(out.size // 8):
        a, b, c, d = np.uint64(i + 1), np.uint64(0), np.uint64(block), np.uint64(0)
        key, lock = np.uint64(first), np.uint64(second)
        for _ in range(10):
            (upper, low), (high, lower) = _product(one, a), _product(other, c)
            a, b, c, d = high ^ b ^ key, lower, upper ^ d ^ lock, low
            key, lock = key + np.uint64(0x9E3779B97F4A7C15), lock + np.uint64(0xBB67AE8584CAA73B)
        eight = out[8 * i : 8 * i + 8]
        eight[0], eight[1] = ((a & half) >> shift) < bound, (a >> np.uint64(40)) < bound
        eight[2], eight[3] = ((b & half) >> shift) < bound, (b >> np.uint64(40)) < bound
        eight[4], eight[5] = ((c & half) >> shift) < bound, (c >> np.uint64(40)) < bound
        eight[6], eight[7] = ((d & half) >> shift) < bound, (d >> np.uint64(40)) < bound

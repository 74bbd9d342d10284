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
# Bits that are ranked at a time, at most, and how many times this takes for 63.
_DIGIT, _PASSES = 11, 6
_NOT_A_NUMBER = np.float64(np.nan).view(np.int64)


@compiled
def _pattern(one: Any, other: Any) -> Any:
    """Return the bits of |one − other|, which grow with it; 0 where both are equal, infinities too."""
    return np.float64(abs(one - other) if one != other else 0.0).view(np.int64)


@compiled
def count_between(
    base: Array, policy: Array, low: float, high: float, found: Array
) -> tuple[int, tuple[int, int, int, int]]:
    """Copy the |τ| between two; return their number, and how many are above, equal to `high`, equal to `low`, zero.

    If both are equal, these are counted as `high`.

    Args:
        base: n stored values.
        policy: n stored values; τ is their difference, and a NaN is above infinity.
        low: ≥ 0.
        high: ≥ low.
        found: takes the magnitudes between, at its front.
    """
    least, most = np.float64(low).view(np.int64), np.float64(high).view(np.int64)
    place = above = top = bottom = zeros = 0
    for start in range(0, base.size, _GROUP):
        one, other, between = policy[start : start + _GROUP], base[start : start + _GROUP], 0
        for i in range(one.size):
            pattern = _pattern(_widen(one[i]), _widen(other[i]))
            above += pattern > most
            top += pattern == most
            bottom += (pattern == least) & (least < most)
            zeros += pattern == 0
            between += (pattern > least) & (pattern < most)
        if between:
            for i in range(one.size):
                pattern = _pattern(_widen(one[i]), _widen(other[i]))
                if least < pattern < most:
                    found[place] = np.int64(pattern).view(np.float64)
                    place += 1
    return place, (above, top, bottom, zeros)


@compiled
def count_overlaps(residuals: Array, rows: Array, changed: float, counts: Array) -> None:
    """Count the magnitudes above `changed` that several rows have, and those that only one has.

    Args:
        residuals: float64 [N, n].
        rows: those that count.
        changed: ≥ 0.
        counts: [2, rows] the numbers are added here, shared ones first.
    """
    several = np.empty(_GROUP, np.int64)
    for start in range(0, residuals.shape[1], _GROUP):
        size = min(_GROUP, residuals.shape[1] - start)
        several[:] = 0
        for row in rows:
            values = residuals[row, start : start + size]
            for i in range(size):
                several[i] += abs(values[i]) > changed
        for place, row in enumerate(rows):
            values, shared, mine = residuals[row, start : start + size], 0, 0
            for i in range(size):
                large = abs(values[i]) > changed
                mine += large
                shared += large & (several[i] > 1)
            counts[0, place] += shared
            counts[1, place] += mine - shared


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
def _eight(first: int, second: int, block: int, group: int) -> tuple[Any, Any, Any, Any]:
    """Return the 256 bits that the generator Philox4x64-10 makes for a counter: eight numbers of 32 bits.

    They are those of numpy's `Philox(key=[first, second], counter=[0, 0, block, 0])`, group after group; the lower half
    of each word comes first.

    Source: Salmon and others, Parallel random numbers: as easy as 1, 2, 3, SC 2011, doi 10.1145/2063384.2063405.
    """
    one, other = np.uint64(0xD2E7470EE14C6C93), np.uint64(0xCA5A826395121157)
    a, b, c, d = np.uint64(group + 1), np.uint64(0), np.uint64(block), np.uint64(0)
    key, lock = np.uint64(first), np.uint64(second)
    for _ in range(10):
        (upper, low), (high, lower) = _product(one, a), _product(other, c)
        a, b, c, d = high ^ b ^ key, lower, upper ^ d ^ lock, low
        key, lock = key + np.uint64(0x9E3779B97F4A7C15), lock + np.uint64(0xBB67AE8584CAA73B)
    return a, b, c, d


@compiled
def keep_random(out: Array, first: int, second: int, block: int, limit: int) -> None:
    """Fill `out` with booleans, each true with probability limit/2²⁴: the upper 24 bits of a random number decide.

    Args:
        out: n booleans, n a multiple of 8.
        first: a half of the key.
        second: the other half.
        block: the third word of the counter.
        limit: from 0 to 2²⁴.
    """
    bound, shift, half = np.uint64(limit), np.uint64(8), np.uint64(0xFFFFFFFF)
    for i in range(out.size // 8):
        a, b, c, d = _eight(first, second, block, i)
        eight = out[8 * i : 8 * i + 8]
        eight[0], eight[1] = ((a & half) >> shift) < bound, (a >> np.uint64(40)) < bound
        eight[2], eight[3] = ((b & half) >> shift) < bound, (b >> np.uint64(40)) < bound
        eight[4], eight[5] = ((c & half) >> shift) < bound, (c >> np.uint64(40)) < bound
        eight[6], eight[7] = ((d & half) >> shift) < bound, (d >> np.uint64(40)) < bound


@compiled
def draw_numbers(out: Array, first: int, second: int, block: int) -> None:
    """Fill the uint32 array `out`, whose length is a multiple of 8, with the upper 24 bits of random numbers."""
    for i in range(out.size // 8):
        words, eight = _eight(first, second, block, i), out[8 * i : 8 * i + 8]
        for j in range(4):
            eight[2 * j] = np.uint32(words[j]) >> np.uint32(8)
            eight[2 * j + 1] = np.uint32(words[j] >> np.uint64(40))


@compiled
def keep_ranked(
    base: Array, policy: Array, width: int, numbers: Array, limits: Array, factors: Array, skipped: int, out: Array
) -> None:
    """Write a factor where a value is kept, else 0; both depend on the rank of its magnitude in its row.

    Equal magnitudes are ranked in the order of their places, every NaN above infinity.

    Args:
        base: stored values of whole rows.
        policy: likewise; τ is their difference.
        width: the values of a row.
        numbers: n random numbers, uint32.
        limits: [width] by rank, from the smallest: a value is kept if its number is smaller.
        factors: [width] likewise.
        skipped: how many values come before the first of `out`.
        out: n float64.
    """
    # Unsigned places: the compiler need not ask whether one counts from the end.
    keys, ranks = np.empty(width, np.uint64), np.empty(width, np.uint32)
    orders, ends = np.empty((2, width), np.uint32), np.empty((_PASSES, 1 << _DIGIT), np.uint32)
    for start in range(0, base.size, width):
        one, other = policy[start : start + width], base[start : start + width]
        for i in range(width):
            keys[i] = min(_pattern(_widen(one[i]), _widen(other[i])), _NOT_A_NUMBER)
        _rank(keys, orders, ends, ranks)
        first = max(0, skipped - start)
        place = start + first - skipped
        drawn, kept, after = numbers[place : place + width], out[place : place + width], ranks[first:]
        for i in range(min(width - first, drawn.size)):
            rank = after[i]
            kept[i] = factors[rank] if drawn[i] < limits[rank] else 0.0


@compiled
def _rank(keys: Array, orders: Array, ends: Array, ranks: Array) -> None:
    """Write the rank of every key, equal ones in order: a radix sort by the bits in which keys differ.

    Args:
        keys: n uint64, which are changed.
        orders: scratch, [2, n] uint32.
        ends: scratch, [passes, numbers of a digit] uint32.
        ranks: n uint32.
    """
    one, none, largest = np.uint64(1), np.uint64(0), np.uint64(2**64 - 1)
    most, least, union = none, largest, none
    for i in range(keys.size):
        most, union = max(most, keys[i]), union | keys[i]
        least = min(least, keys[i] if keys[i] else largest)
    low, bits = none, 0
    while union and not (union >> low) & one:
        low += one
    # Zero is far from other magnitudes.
    top = ((most - least) >> low) + one if most else none
    while bits < 64 and top >> np.uint64(bits):
        bits += 1
    passes = max(1, -(-bits // _DIGIT))
    digit = -(-bits // passes)
    mask = np.uint64((1 << digit) - 1)
    for i in range(keys.size):
        keys[i] = ((keys[i] - least) >> low) + one if keys[i] else none
    for each in range(passes):
        end, shift = ends[each, : 1 << digit], np.uint64(each * digit)
        end[:] = 0
        for i in range(keys.size):
            end[(keys[i] >> shift) & mask] += np.uint32(1)
        total = np.uint32(0)
        for number in range(end.size):
            end[number], total = total, total + end[number]
        before, after, last = orders[(each + 1) % 2], orders[each % 2], each == passes - 1
        for place in range(keys.size):
            index = np.uint32(place) if each == 0 else before[place]
            number = (keys[index] >> shift) & mask
            # The last pass needs no order.
            if last:
                ranks[index] = end[number]
            else:
                after[end[number]] = index
            end[number] += np.uint32(1)

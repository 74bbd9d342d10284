"""Ranks of magnitudes within rows, by a radix sort that numba compiles."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

Array = np.ndarray[Any, Any]

# Bits that are ranked at a time, at most, and how many times this takes for 63.
_DIGIT, _PASSES = 11, 6
_NOT_A_NUMBER = np.float64(np.nan).view(np.int64)


def compiled(function: Any) -> Any:
    """Compile a kernel on first use; it runs without the interpreter's lock."""
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:
        # No folder for the cache is writable: each process compiles for itself.
        return numba.njit(nogil=True)(function)


@compiled
def rank_rows(sizes: Array, width: int, skipped: int, ranks: Array) -> None:
    """See `numpy_kernels.rank_rows`."""
    # Unsigned places: the compiler need not ask whether one counts from the end.
    keys, found = np.empty(width, np.uint64), np.empty(width, np.uint32)
    orders, ends = np.empty((2, width), np.uint32), np.empty((_PASSES, 1 << _DIGIT), np.uint32)
    for start in range(0, sizes.size, width):
        row = sizes[start : start + width]
        for i in range(width):
            keys[i] = min(np.float64(abs(row[i])).view(np.int64), _NOT_A_NUMBER)
        _rank(keys, orders, ends, found)
        first = max(0, skipped - start)
        place = start + first - skipped
        out, after = ranks[place : place + width], found[first:]
        for i in range(min(width - first, out.size)):
            out[i] = after[i]


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

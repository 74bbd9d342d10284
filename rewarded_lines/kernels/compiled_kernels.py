"""The compiled inner loops: each value is widened to float64, merged, and rounded once, to nearest even.

The loops go value by value, so that memory traffic is only the bytes of the files. numba compiles them on first use,
for each combination of types, and caches the machine code. No fast-math: operations run in the order written here, so
the bits do not depend on vector width, threads or blocks. Processors choose the sign and the lower bits of a NaN by the
order of operands, so every NaN is stored as the one quiet, positive pattern of its type.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numba import types
from numba.extending import overload

Array = np.ndarray[Any, Any]

# Values widened at a time: two float64 rows of this length stay in the innermost cache.
_CHUNK = 512
_EXPONENT = np.uint64(0x7FF0000000000000)


def compiled(function: Callable[..., Any]) -> Any:
    """Compile a kernel on first use; it runs without the interpreter's lock."""
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:
        # No folder for the cache is writable: each process compiles for itself.
        return numba.njit(nogil=True)(function)


def _widen(value: Any) -> Any:
    """Return one stored value as float64, exactly; the storage type determines the format."""
    raise NotImplementedError(value)


@overload(_widen)  # type: ignore[untyped-decorator]
def _choose_widen(value: Any) -> Any:
    if value == types.uint16:

        def bfloat16(value: Any) -> Any:
            return np.float64(np.uint32(np.uint32(value) << np.uint32(16)).view(np.float32))

        return bfloat16
    if value == types.int16:

        def float16(value: Any) -> Any:
            bits = np.uint32(np.uint16(value))
            exponent = bits & np.uint32(0x7C00)
            # As a float32, exponent and mantissa are 2¹¹² too small, of subnormal values, too.
            small = np.uint32((bits & np.uint32(0x7FFF)) << np.uint32(13)).view(np.float32)
            size = np.float64(small) * 2.0**112
            special = np.uint32(((bits & np.uint32(0x7FFF)) << np.uint32(13)) | np.uint32(0x7F800000)).view(np.float32)
            if exponent == np.uint32(0x7C00):
                size = np.float64(special)
            return -size if bits & np.uint32(0x8000) else size

        return float16

    def wide(value: Any) -> Any:
        return np.float64(value)

    return wide


def _store(out: Any, index: Any, value: Any) -> Any:
    """Round a float64 once to the type of `out` and store it, every NaN alike; return whether it is not finite."""
    raise NotImplementedError(out, index, value)


@overload(_store)  # type: ignore[untyped-decorator]
def _choose_store(out: Any, index: Any, value: Any) -> Any:
    # Adding and subtracting 1.5·2⁵²·ulp rounds a float64 to a multiple of ulp, ties to even, in a single rounding.
    # `ulp` is that of the target type at this exponent, so the result is exact in the target type.
    if out.dtype == types.uint16:

        def bfloat16(out: Any, index: Any, value: Any) -> Any:
            exponent = np.uint64(np.float64(value).view(np.uint64) & _EXPONENT)
            # Bounded above, too: far beyond the type's range the magic number itself would be NaN.
            exponent = min(max(exponent, np.uint64((1023 - 126) << 52)), np.uint64((1023 + 200) << 52))
            magic = np.uint64(exponent + np.uint64((45 << 52) | (1 << 51))).view(np.float64)
            bits = np.float32((value + magic) - magic).view(np.uint32)
            # A sum with a positive number loses the sign of a zero: put it back.
            bits |= np.uint32(np.float64(value).view(np.uint64) >> np.uint64(32)) & np.uint32(0x80000000)
            if value != value:
                bits = np.uint32(0x7FC00000)
            out[index] = np.uint16(bits >> np.uint32(16))
            return (bits & np.uint32(0x7F800000)) == np.uint32(0x7F800000)

        return bfloat16
    if out.dtype == types.int16:

        def float16(out: Any, index: Any, value: Any) -> Any:
            sign = np.uint32(np.float64(value).view(np.uint64) >> np.uint64(48)) & np.uint32(0x8000)
            size = abs(value)
            exponent = np.uint64(np.float64(size).view(np.uint64) & _EXPONENT)
            exponent = max(exponent, np.uint64((1023 - 14) << 52))
            magic = np.uint64(exponent + np.uint64((42 << 52) | (1 << 51))).view(np.float64)
            rounded = (size + magic) - magic
            # As a float32, 2⁻¹¹² times it has a float16's exponent field; below 2⁻¹⁴ it is subnormal in both.
            bits = np.float32(rounded * 2.0**-112).view(np.uint32) >> np.uint32(13)
            bad = not (size < 65520.0)
            if bad:
                bits = np.uint32(0x7C00)
            bits |= sign
            if value != value:
                bits = np.uint32(0x7E00)
            out[index] = np.int16(np.uint16(bits))
            return bad

        return float16

    def wide(out: Any, index: Any, value: Any) -> Any:
        out[index] = value if value == value else np.nan
        return not (abs(out[index]) < np.inf)

    return wide


@compiled
def linear(
    base: Array, policies: Array, rows: Array, weights: Array, out: Array, counts: Array, first: int = 0
) -> None:
    """Write base + Σ_j w_kj·(policy_{r_j} − base) for every output k; count results that are not finite.

    Args:
        base: n stored values.
        policies: [N, ≥ first + n] stored values of the same type.
        rows: the policies that take part, in the order of the sum; at least one.
        weights: [outputs, rows] their factors times the schedule's scale.
        out: [outputs, ≥ n] values of the outputs' storage type.
        counts: [outputs] the numbers of results that are not finite are added here.
        first: where the policies' values that belong to `base` begin.
    """
    origin, total, residuals = np.empty(_CHUNK), np.empty(_CHUNK), np.empty((rows.size, _CHUNK))
    for start in range(0, base.size, _CHUNK):
        # Slices: the compiler vectorizes loops whose indices start at 0.
        source = base[start : start + _CHUNK]
        for i in range(source.size):
            origin[i] = _widen(source[i])
        for j in range(rows.size):
            policy, residual = policies[rows[j], first + start : first + start + _CHUNK], residuals[j]
            for i in range(source.size):
                residual[i] = _widen(policy[i]) - origin[i]
        for k in range(weights.shape[0]):
            residual, weight = residuals[0], weights[k, 0]
            for i in range(source.size):
                total[i] = residual[i] * weight
            for j in range(1, rows.size):
                residual, weight = residuals[j], weights[k, j]
                for i in range(source.size):
                    total[i] += residual[i] * weight
            target, count = out[k, start : start + _CHUNK], 0
            for i in range(source.size):
                count += _store(target, i, origin[i] + total[i])
            counts[k] += count


@compiled
def restore(base: Array, policies: Array, rows: Array, weights: Array, out: Array, first: int = 0) -> None:
    """Do `linear` again where the base is not finite: an equal policy adds nothing, in place of inf − inf = NaN."""
    for i in range(base.size):
        origin = _widen(base[i])
        if abs(origin) < np.inf:
            continue
        for k in range(weights.shape[0]):
            total = 0.0
            for j in range(rows.size):
                value = _widen(policies[rows[j], first + i])
                if value != origin:
                    total += weights[k, j] * (value - origin)
            _store(out[k], i, origin + total)


@compiled
def residual(base: Array, policy: Array, out: Array) -> None:
    """Write policy − base to the float64 array `out`, 0 where both are equal; each input may be of any stored type."""
    for i in range(base.size):
        one, other = _widen(policy[i]), _widen(base[i])
        # Inf − inf would be NaN.
        _store(out, i, one - other if one != other else 0.0)


@compiled
def finish(base: Array, merged: Array, scale: float, out: Array) -> int:
    """Write base + scale·merged, a float64 residual; return how many results are not finite."""
    count = 0
    for i in range(base.size):
        count += _store(out, i, _widen(base[i]) + scale * merged[i])
    return count


@compiled
def cast(values: Array, out: Array) -> int:
    """Write `values` to `out`, rounded to its type; return how many results are not finite."""
    count = 0
    for i in range(values.size):
        count += _store(out, i, _widen(values[i]))
    return count


@compiled
def count_nonfinite(values: Array) -> int:
    """Return how many stored values are NaN or infinite."""
    count = 0
    for i in range(values.size):
        count += not (abs(_widen(values[i])) < np.inf)
    return count


@compiled
def product(left: Array, right: Array, scale: float, start: int, out: Array) -> None:
    """Write a run of the flat matrix scale·(left @ right) to the float64 array `out`.

    Args:
        left: [rows, r] float64.
        right: [r, columns] float64.
        scale: the factor.
        start: the flat index of the first value, row by row.
        out: takes the values from `start` on.
    """
    rank, columns = right.shape
    place = 0
    while place < out.size:
        row, first = (start + place) // columns, (start + place) % columns
        length = min(columns - first, out.size - place, _CHUNK)
        # Slices, as above; a chunk stays in cache while the terms are added.
        target = out[place : place + length]
        target[:] = 0.0
        for k in range(rank):
            factor, along = left[row, k], right[k, first : first + length]
            for i in range(length):
                target[i] += factor * along[i]
        for i in range(length):
            _store(target, i, target[i] * scale)
        place += length


@compiled
def count_magnitudes(values: Array, prefix: int, shift: int, bits: int, counts: Array) -> None:
    """Count magnitudes by some of their bits: one pass of a radix selection.

    The bit pattern of |v|, a float64, grows with |v|. The patterns whose highest bits are `prefix` are counted by their
    next bits.

    Args:
        values: float64.
        prefix: all bits above `shift` + `bits`.
        shift: the number of bits below the counted ones.
        bits: how many bits are counted.
        counts: int64 [2^bits]; the counts are added here.
    """
    mask = np.uint64((1 << bits) - 1)
    low, high = np.uint64(shift), np.uint64(shift + bits)
    wanted = np.uint64(prefix)
    for i in range(values.size):
        pattern = np.uint64(np.float64(abs(values[i])).view(np.uint64))
        if pattern >> high == wanted:
            counts[np.int64((pattern >> low) & mask)] += 1


@compiled
def collect_magnitudes(values: Array, prefix: int, shift: int, out: Array) -> int:
    """Copy the magnitudes whose bits above `shift` are `prefix` to the front of `out`; return their number."""
    place, low, wanted = 0, np.uint64(shift), np.uint64(prefix)
    for i in range(values.size):
        magnitude = np.float64(abs(values[i]))
        if magnitude.view(np.uint64) >> low == wanted:
            out[place] = magnitude
            place += 1
    return place


@compiled
def place_columns(values: Array, width: int, factor: float, first: int, columns: int, out: Array) -> int:
    """Write factor·values into columns of a matrix; return how many results are not finite.

    Args:
        values: stored values, [rows, width], flat.
        width: the columns of `values`.
        factor: applied in float64.
        first: the column of the matrix that takes the first column of `values`.
        columns: the columns of the matrix.
        out: the matrix in its storage type, [rows, columns], flat.
    """
    count = 0
    for row in range(values.size // width):
        source = values[row * width : (row + 1) * width]
        target = out[row * columns + first : row * columns + first + width]
        for i in range(width):
            count += _store(target, i, _widen(source[i]) * factor)
    return count

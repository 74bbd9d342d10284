"""The loops of `compiled_kernels` and `compiled_choices` in numpy: the same arguments and the same bits.

No compiler is loaded, each value takes longer.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from rewarded_lines.checkpoints.dtypes import as_float64

Array = np.ndarray[Any, Any]
_EXPONENT = np.uint64(0x7FF0000000000000)
# The one NaN of each storage type, quiet and positive.
_NAN = {"uint16": 0x7FC0, "int16": 0x7E00, "float32": np.nan, "float64": np.nan}


def _store(out: Array, values: Array) -> int:
    """Round float64 values once to the type of `out`, every NaN to its one pattern; return how many are not finite."""
    if out.dtype == np.uint16:
        # As in the compiled loop: a sum with 1.5·2⁵²·ulp rounds to a multiple of the target's ulp.
        bits = values.view(np.uint64)
        exponents = np.clip(bits & _EXPONENT, np.uint64((1023 - 126) << 52), np.uint64((1023 + 200) << 52))
        magic = (exponents + np.uint64((45 << 52) | (1 << 51))).view(np.float64)
        narrow = ((values + magic) - magic).astype(np.float32)
        out[:] = narrow.view(np.uint32) >> np.uint32(16)
        out |= (bits >> np.uint64(48)).astype(np.uint16) & np.uint16(0x8000)
    else:
        narrow = values.astype(np.float16 if out.dtype == np.int16 else out.dtype)
        out[:] = narrow.view(out.dtype)
    bad = int(narrow.size - np.count_nonzero(np.isfinite(narrow)))
    if bad:
        out[np.isnan(values)] = _NAN[out.dtype.name]
    return bad


def linear(
    base: Array, policies: Array, rows: Array, weights: Array, out: Array, counts: Array, first: int = 0
) -> None:
    """Write base + Σ_j w_kj·(policy_{r_j} − base) for every output k."""
    origin = as_float64(base)
    residuals = [as_float64(policies[row, first : first + base.size]) - origin for row in rows]
    for k, factors in enumerate(weights):
        total = residuals[0] * factors[0]
        for residual, factor in zip(residuals[1:], factors[1:], strict=True):
            total += residual * factor
        counts[k] += _store(out[k, : base.size], origin + total)


def restore(base: Array, policies: Array, rows: Array, weights: Array, out: Array, first: int = 0) -> None:
    """Do `linear` again where the base is not finite."""
    places = np.flatnonzero(~np.isfinite(as_float64(base)))
    origin = as_float64(base[places])
    for k, factors in enumerate(weights):
        total = np.zeros(places.size)
        for row, factor in zip(rows, factors, strict=True):
            values = as_float64(policies[row, first + places])
            total += np.where(values != origin, factor * (values - origin), 0.0)
        narrow = np.empty(places.size, out.dtype)
        _store(narrow, origin + total)
        out[k, places] = narrow


def residual(base: Array, policy: Array, out: Array) -> None:
    """Write policy − base to the float64 array `out`, 0 where both are equal."""
    one, other = as_float64(policy), as_float64(base)
    _store(out, np.where(one != other, one - other, 0.0))


def finish(base: Array, merged: Array, scale: float, out: Array) -> int:
    """Write base + scale·merged; return how many results are not finite."""
    return _store(out, as_float64(base) + scale * merged)


def cast(values: Array, out: Array) -> int:
    """Write `values` to `out`, rounded to its type; return how many results are not finite."""
    return _store(out, as_float64(values))


def count_nonfinite(values: Array) -> int:
    """Return how many stored values are NaN or infinite."""
    return int(values.size - np.count_nonzero(np.isfinite(as_float64(values))))


def product(left: Array, right: Array, scale: float, start: int, out: Array) -> None:
    """Write a run of the flat matrix scale·(left @ right) to `out`; each value is summed in the order of the ranks."""
    first, last = start // right.shape[1], -(-(start + out.size) // right.shape[1])
    total = np.zeros((last - first, right.shape[1]))
    for column, row in zip(left[first:last].T, right, strict=True):
        total += column[:, None] * row
    total *= scale
    skipped = start - first * right.shape[1]
    _store(out, total.ravel()[skipped : skipped + out.size])


def count_magnitudes(values: Array, prefix: int, shift: int, bits: int, counts: Array) -> None:
    """Count magnitudes by some of their bits."""
    patterns = np.abs(values).view(np.uint64)
    taken = patterns[patterns >> np.uint64(shift + bits) == np.uint64(prefix)]
    places = (taken >> np.uint64(shift)) & np.uint64((1 << bits) - 1)
    counts += np.bincount(places.astype(np.int64), minlength=counts.size)


def collect_magnitudes(values: Array, prefix: int, shift: int, out: Array) -> int:
    """Copy the magnitudes whose bits above `shift` are `prefix` to the front of `out`; return their number."""
    magnitudes = np.abs(values)
    taken = magnitudes[magnitudes.view(np.uint64) >> np.uint64(shift) == np.uint64(prefix)]
    out[: taken.size] = taken
    return int(taken.size)


def count_between(
    base: Array, policy: Array, low: float, high: float, found: Array
) -> tuple[int, tuple[int, int, int, int]]:
    """Copy the |τ| between two; return their number, and how many are above, equal to `high`, equal to `low`, zero."""
    magnitudes = np.empty(base.size)
    residual(base, policy, magnitudes)
    patterns, (least, most) = np.abs(magnitudes).view(np.int64), np.array([low, high]).view(np.int64)
    taken = patterns[(patterns > least) & (patterns < most)].view(np.float64)
    found[: taken.size] = taken
    sets = patterns > most, patterns == most, (patterns == least) & (least < most), patterns == 0
    above, top, bottom, zeros = (int(np.count_nonzero(each)) for each in sets)
    return int(taken.size), (above, top, bottom, zeros)


def keep_random(out: Array, first: int, second: int, block: int, limit: int) -> None:
    """Fill `out` with booleans, each true with probability limit/2²⁴."""
    generator = np.random.Generator(np.random.Philox(key=[first, second], counter=[0, 0, block, 0]))
    np.less(generator.random(out.size, np.float32), np.float32(limit / 2**24), out=out)


def draw_numbers(out: Array, first: int, second: int, block: int) -> None:
    """Fill the uint32 array `out` with the upper 24 bits of random numbers."""
    generator = np.random.Generator(np.random.Philox(key=[first, second], counter=[0, 0, block, 0]))
    out[:] = generator.random(out.size, np.float32) * np.float32(2**24)


def keep_ranked(
    base: Array, policy: Array, width: int, numbers: Array, limits: Array, factors: Array, skipped: int, out: Array
) -> None:
    """Write a factor where a value is kept, else 0; both depend on the rank of its magnitude in its row."""
    sizes = np.empty(base.size)
    residual(base, policy, sizes)
    order = np.argsort(np.abs(sizes).reshape(-1, width), axis=1, kind="stable")
    ranks = np.empty_like(order)
    np.put_along_axis(ranks, order, np.arange(width)[None], axis=1)
    ranks = ranks.ravel()[skipped : skipped + out.size]
    out[:] = np.where(numbers < limits[ranks], factors[ranks], 0.0)


def count_overlaps(residuals: Array, rows: Array, changed: float, counts: Array) -> None:
    """Count the magnitudes above `changed` that several rows have, and those that only one has."""
    masks = np.abs(residuals[rows]) > changed
    several = masks.sum(axis=0) > 1
    counts += (masks & several).sum(axis=1), (masks & ~several).sum(axis=1)


def place_columns(values: Array, width: int, factor: float, first: int, columns: int, out: Array) -> int:
    """Write factor·values into columns of a matrix; return how many results are not finite."""
    wide = as_float64(values) * factor
    narrow = np.empty(wide.size, out.dtype)
    count = _store(narrow, wide)
    out.reshape(-1, columns)[:, first : first + width] = narrow.reshape(-1, width)
    return count

"""The loops over values in numpy: each value is widened to float64, merged, and rounded once, to nearest even.

Processors choose the sign and the lower bits of a NaN by the order of operands, so every NaN is stored as the one
quiet, positive pattern of its type. `machine_kernels` has the same loops as machine code, with the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
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
        # As in machine code: a sum with 1.5·2⁵²·ulp rounds to a multiple of the target's ulp.
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


def linear(base: Array, policies: Sequence[Array], weights: Sequence[float], out: Array) -> int:
    """Write base + Σ_j w_j·(policy_j − base); return how many results are not finite.

    Args:
        base: n stored values.
        policies: n stored values of the same type each, in the order of the sum; at least one.
        weights: their factors times the schedule's scale.
        out: n values of the output's storage type.
    """
    origin = as_float64(base)
    total: Any = 0.0
    for place, (policy, weight) in enumerate(zip(policies, weights, strict=True)):
        term = (as_float64(policy) - origin) * weight
        total = total + term if place else term
    bad = _store(out, origin + total)
    # Where the base is not finite, an equal policy adds nothing, in place of inf − inf = NaN.
    if bad and (places := np.flatnonzero(~np.isfinite(origin))).size:
        origin, total = origin[places], np.zeros(places.size)
        for policy, weight in zip(policies, weights, strict=True):
            values = as_float64(policy[places])
            total += np.where(values != origin, weight * (values - origin), 0.0)
        narrow = np.empty(places.size, out.dtype)
        _store(narrow, origin + total)
        out[places] = narrow
    return bad


def residual(base: Array, policy: Array, out: Array) -> None:
    """Write policy − base to the float64 array `out`, 0 where both are equal; each input may be of any stored type."""
    one, other = as_float64(policy), as_float64(base)
    _store(out, np.where(one != other, one - other, 0.0))


def finish(base: Array, merged: Array, scale: float, out: Array) -> int:
    """Write base + scale·merged, a float64 residual; return how many results are not finite."""
    return _store(out, as_float64(base) + scale * merged)


def cast(values: Array, out: Array) -> int:
    """Write `values` to `out`, rounded to its type; return how many results are not finite."""
    return _store(out, as_float64(values))


def count_nonfinite(values: Array) -> int:
    """Return how many stored values are NaN or infinite."""
    return int(values.size - np.count_nonzero(np.isfinite(as_float64(values))))


def product(left: Array, right: Array, scale: float, start: int, out: Array) -> None:
    """Write a run of the flat matrix scale·(left @ right) to `out`; each value is summed in the order of the ranks.

    Args:
        left: [rows, r] float64.
        right: [r, columns] float64.
        scale: the factor.
        start: the flat index of the first value, row by row.
        out: float64, takes the values from `start` on.
    """
    first, last = start // right.shape[1], -(-(start + out.size) // right.shape[1])
    total = np.zeros((last - first, right.shape[1]))
    for column, row in zip(left[first:last].T, right, strict=True):
        total += column[:, None] * row
    total *= scale
    skipped = start - first * right.shape[1]
    _store(out, total.ravel()[skipped : skipped + out.size])


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
    pairs: Sequence[tuple[Array, Array]], bounds: Sequence[tuple[float, float]], found: Sequence[Array]
) -> tuple[list[tuple[int, ...]], int]:
    """Copy the |τ| between each two bounds; return their number, and how many are above, and equal to either.

    The upper bound comes first. If both are equal, the lower has none. Also returned: how many |τ| of the first policy
    are zero.

    Args:
        pairs: of each policy n stored values of the base and its own; τ is their difference, a NaN is above infinity.
        bounds: ≥ 0, the lower first; of the policies in turn, which may come several times.
        found: for each of the bounds, takes the magnitudes between at its front.
    """
    sizes, counts = [], []
    for base, policy in pairs:
        magnitudes = np.empty(base.size)
        residual(base, policy, magnitudes)
        sizes.append(np.abs(magnitudes).view(np.int64))
    for row, (limits, out) in enumerate(zip(bounds, found, strict=True)):
        patterns, (least, most) = sizes[row % len(sizes)], np.array(limits, np.float64).view(np.int64)
        taken = patterns[(patterns > least) & (patterns < most)].view(np.float64)
        out[: taken.size] = taken
        sets = patterns > most, patterns == most, (patterns == least) & (least < most)
        counts.append((int(taken.size), *(int(np.count_nonzero(each)) for each in sets)))
    return counts, int(np.count_nonzero(sizes[0] == 0))


def rank_rows(base: Array, policy: Array, width: int, skipped: int, ranks: Array) -> None:
    """Write the rank of every |τ| in its row, from 0; equal ones in order, every NaN above infinity.

    Args:
        base: stored values of whole rows.
        policy: likewise; τ is their difference.
        width: the values of a row.
        skipped: how many values come before the first of `ranks`.
        ranks: n uint32.
    """
    sizes = np.empty(base.size)
    residual(base, policy, sizes)
    order = np.argsort(np.abs(sizes).reshape(-1, width), axis=1, kind="stable")
    found = np.empty_like(order)
    np.put_along_axis(found, order, np.arange(width)[None], axis=1)
    ranks[:] = found.ravel()[skipped : skipped + ranks.size]


def count_overlaps(pairs: Sequence[tuple[Array, Array]], changed: float, counts: Array) -> None:
    """Count the magnitudes above `changed` that several policies have, and those that only one has.

    Args:
        pairs: of each policy two arrays whose difference is τ.
        changed: ≥ 0.
        counts: [2, policies] the numbers are added here, shared ones first.
    """
    residuals = np.empty((len(pairs), pairs[0][0].size))
    for pair, out in zip(pairs, residuals, strict=True):
        residual(*pair, out)
    masks = np.abs(residuals) > changed
    several = masks.sum(axis=0) > 1
    counts += (masks & several).sum(axis=1), (masks & ~several).sum(axis=1)


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
    wide = as_float64(values) * factor
    narrow = np.empty(wide.size, out.dtype)
    count = _store(narrow, wide)
    out.reshape(-1, columns)[:, first : first + width] = narrow.reshape(-1, width)
    return count

"""The k-th largest magnitude of tensors that need not fit in memory: by a sample and one pass, or by a radix."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from rewarded_lines.checkpoints.reader import TensorFiles
from rewarded_lines.kernels.between_bounds import Bounds, ranked_between
from rewarded_lines.kernels.blocks import Array, Source
from rewarded_lines.kernels.magnitudes import HELD, Block, Magnitudes, bin_of, largest
from rewarded_lines.kernels.tensor_merge import TensorMerge

# Shift and number of the bits of each pass over float64 magnitudes. 2¹⁸ counts stay in cache.
_LEVELS = ((45, 18), (27, 18), (9, 18), (0, 9))
# More values are not ranked all: a sample of one in so many shows which to rank.
_FEW, _THINNED = 1 << 18, 256


def kth_largest(
    base: TensorFiles, policies: Sequence[Source], names: Sequence[str], ranks: Sequence[int], threads: int = 0
) -> list[tuple[float, ...]]:
    """Return for each rank, and for each policy, the |τ| of that rank in some tensors, which need not fit in memory.

    A sample tells between which two values the result very probably is. One pass over the files counts what is above
    them and ranks what is between. Otherwise by a radix selection: each pass counts magnitudes by their next bits, from
    the top. The result is exact.

    Args:
        base: the SFT model.
        policies: each is ranked by itself.
        names: the tensors, ranked together.
        ranks: from 1, the largest, to the number of values.
        threads: 0 for all cores.
    """
    values = Magnitudes(base, policies, names, threads)
    if values.total * values.rows > _FEW:
        samples = _sample(values)
        bounds = [_bounds(each, rank / values.total) for rank in ranks for each in samples]
        wanted = [rank for rank in ranks for _ in samples]
        found = ranked_between(values, bounds, lambda _: wanted)
        if isinstance(found, tuple):
            return [found[first : first + values.rows] for first in range(0, len(found), values.rows)]
    return [_by_radix(values, rank) for rank in ranks]


def share_of_nonzero(
    base: TensorFiles, policies: Sequence[Source], names: Sequence[str], share: float, rule: TensorMerge
) -> float:
    """Return the ⌊share·n⌋-th largest of the n values of some tensors that are not 0; infinity if that is the 0th.

    In one thread and, by a sample, in one pass over the files: n is counted meanwhile. See `kth_largest`.
    """
    values = Magnitudes(base, policies, names, 1, rule)
    if values.total <= _FEW:
        (held,) = values.all_of(values.blocks)
        together = np.concatenate([np.empty(0), *held])
        rank = int(share * np.count_nonzero(together))
        return largest(together, rank) if rank else math.inf
    (samples,) = _sample(values)
    some = np.count_nonzero(np.concatenate(samples)) / sum(part.size for part in samples)
    found = ranked_between(
        values, [_bounds(samples, share * some)], lambda zeros: [int(share * (values.total - zeros))]
    )
    if isinstance(found, tuple):
        return found[0]
    return _by_radix(values, found[0])[0] if found[0] else math.inf


def _by_radix(values: Magnitudes, rank: int) -> tuple[float, ...]:
    """Return for each row the value of a rank, by a radix selection."""
    ranks, prefixes = [rank] * values.rows, [0] * values.rows
    left, shift = [values.total] * values.rows, 63
    for lower, bits in _LEVELS:
        if sum(left) <= HELD:
            break
        for row, table in enumerate(values.count(prefixes, lower, bits)):
            bin_, ranks[row] = bin_of(table, ranks[row])
            prefixes[row], left[row] = (prefixes[row] << bits) | bin_, int(table[bin_])
        shift = lower
    if shift == 0:
        return tuple(float(value) for value in np.array(prefixes, np.uint64).view(np.float64))
    held = values.all_of(values.blocks) if shift == 63 else values.collect(prefixes, shift)
    return tuple(largest(np.concatenate(parts), rank) for parts, rank in zip(held, ranks, strict=True))


def _sample(values: Magnitudes) -> list[list[Array]]:
    """Return for each row the magnitudes of a part of each block."""
    part = min(1.0, max(1, min(values.total // _THINNED, HELD // values.rows)) / values.total)
    return values.all_of(list(_thinned(values.blocks, part)))


def _thinned(blocks: Sequence[Block], part: float) -> Iterator[Block]:
    """Yield a part of each block, from another place in each, so that no column of a matrix is preferred."""
    for index, (name, start, count) in enumerate(blocks):
        size = max(1, round(count * part))
        yield name, start + int(index * 0.618034 % 1 * (count - size)), size


def _bounds(parts: Sequence[Array], share: float) -> Bounds:
    """Return two values between which the one lies that `share` of all values exceed, judged by parts of some blocks.

    The distance is four standard errors; those of parts, since values of one block are alike.
    """
    values = np.concatenate(parts)
    last = values.size - 1
    place = int(share * last)
    values.partition(last - place)
    middle, sizes = values[last - place], np.array([part.size for part in parts])
    hits = np.array([np.count_nonzero(part >= middle) for part in parts])
    margin = 1 + int(4 * math.sqrt(((hits - hits.sum() / values.size * sizes) ** 2).sum()))
    below, above = last - place - margin, last - place + margin
    values.partition([max(0, below), min(last, above)])
    low = float(values[below]) if below >= 0 else 0.0
    high = float(values[above]) if above <= last else math.inf
    inside, ends = (values > low) & (values < high), (values == low) | (values == high)
    return Bounds(low, high, np.count_nonzero(inside) / values.size, np.count_nonzero(ends) / values.size)

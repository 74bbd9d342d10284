"""The k-th largest magnitude of tensors that need not fit in memory: by a sample and one pass, or by a radix."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from threading import Lock
from typing import Any, NamedTuple

import numpy as np

from rewarded_lines.checkpoints.reader import TensorFiles
from rewarded_lines.kernels import kernels
from rewarded_lines.kernels.blocks import BLOCK, Array, Source, Workspace, all_blocks
from rewarded_lines.kernels.tensor_merge import TensorMerge
from rewarded_lines.kernels.thread_pool import share_out

Block = tuple[str, int, int]
Visitor = Callable[[Any], None]
Visit = Callable[..., None]
# Shift and number of the bits of each pass over float64 magnitudes. 2¹⁸ counts stay in cache.
_LEVELS = ((45, 18), (27, 18), (9, 18), (0, 9))
# So many values are ranked in memory, at most.
_HELD = 1 << 23
# More are not ranked all: a sample of one in so many shows which to rank.
_FEW, _THINNED = 1 << 18, 256


class Bounds(NamedTuple):
    """Two magnitudes, and about which share of all values lies between them."""

    low: float
    high: float
    share: float


def kth_largest(
    base: TensorFiles,
    policies: Sequence[Source],
    names: Sequence[str],
    ranks: Sequence[int],
    threads: int = 0,
    ranked: TensorMerge | None = None,
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
        ranked: a rule that makes the one row of values that are ranked in place of the residuals.
    """
    blocks, rows = list(all_blocks(names, base.tensors)), 1 if ranked else len(policies)
    visit = partial(visit_blocks, base, policies, blocks, threads, ranked=ranked)
    total = sum(count for _, _, count in blocks)
    if total * rows > min(_HELD, _FEW):
        samples = _sample(base, policies, blocks, threads, ranked)
        bounds = [_bounds(each, rank / total) for rank in ranks for each in samples]
        found = _ranked_between(visit, bounds, lambda _: [rank for rank in ranks for _ in samples], total)
        if isinstance(found, tuple):
            return [found[first : first + rows] for first in range(0, len(found), rows)]
    return [_by_radix(visit, rank, rows, total) for rank in ranks]


def _by_radix(visit: Visit, rank: int, rows: int, total: int) -> tuple[float, ...]:
    """Return for each row of `total` values the one of a rank, by a radix selection."""
    ranks, prefixes = [rank] * rows, [0] * rows
    left, shift = [total] * rows, 63
    for lower, bits in _LEVELS:
        if sum(left) <= _HELD:
            break
        for row, table in enumerate(_count(visit, prefixes, lower, bits)):
            # above[i]: how many values lie in the highest i + 1 bins.
            above = np.cumsum(table[::-1])
            place = int(np.searchsorted(above, ranks[row]))
            ranks[row] -= int(above[place - 1]) if place else 0
            bin_ = len(table) - 1 - place
            prefixes[row], left[row] = (prefixes[row] << bits) | bin_, int(table[bin_])
        shift = lower
    if shift == 0:
        return tuple(float(value) for value in np.array(prefixes, np.uint64).view(np.float64))
    held = _collect(visit, prefixes, shift)
    return tuple(_largest(np.concatenate(parts), rank) for parts, rank in zip(held, ranks, strict=True))


def share_of_nonzero(
    base: TensorFiles, policies: Sequence[Source], names: Sequence[str], share: float, ranked: TensorMerge
) -> float:
    """Return the ⌊share·n⌋-th largest of the n values of some tensors that are not 0; infinity if that is the 0th.

    In one thread and, by a sample, in one pass over the files: n is counted meanwhile. See `kth_largest`.
    """
    blocks = list(all_blocks(names, base.tensors))
    total = sum(count for _, _, count in blocks)
    visit = partial(visit_blocks, base, policies, blocks, 1, ranked=ranked)
    if total <= min(_HELD, _FEW):
        (held,) = _collect(visit, [0], 63)
        values = np.concatenate([np.empty(0), *held])
        rank = int(share * np.count_nonzero(values))
        return _largest(values, rank) if rank else math.inf
    (samples,) = _sample(base, policies, blocks, 1, ranked)
    some = np.count_nonzero(np.concatenate(samples)) / sum(part.size for part in samples)
    found = _ranked_between(
        visit, [_bounds(samples, share * some)], lambda zeros: [int(share * (total - zeros))], total
    )
    if isinstance(found, tuple):
        return found[0]
    return _by_radix(visit, found[0], 1, total)[0] if found[0] else math.inf


def _sample(
    base: TensorFiles, policies: Sequence[Source], blocks: Sequence[Block], threads: int, ranked: TensorMerge | None
) -> list[list[Array]]:
    """Return for each row the magnitudes of a part of each block."""
    rows, total = 1 if ranked else len(policies), sum(count for _, _, count in blocks)
    part = min(1.0, max(1, min(total // _THINNED, _HELD // rows)) / total)
    return _collect(
        partial(visit_blocks, base, policies, list(_thinned(blocks, part)), threads, ranked=ranked), [0] * rows, 63
    )


def _largest(values: Array, rank: int) -> float:
    return float(np.partition(values, values.size - rank)[values.size - rank])


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
    return Bounds(low, high, np.count_nonzero((values > low) & (values < high)) / values.size)


def _ranked_between(
    visit: Visit, bounds: Sequence[Bounds], wanted: Callable[[int], list[int]], total: int
) -> tuple[float, ...] | list[int]:
    """Return the value of each bound's rank; or the ranks, if a value is not within its bounds, or too many values are.

    Bounds are of the rows in turn, which may come several times. `wanted` gives their ranks by the zeros of the first.
    """
    counts, zeros = np.zeros((len(bounds), 3), np.int64), 0
    parts, lock = [[np.empty(0)] for _ in bounds], Lock()
    if sum(bound.share for bound in bounds) * total > _HELD:
        bounds = [Bounds(math.inf, math.inf, 0.0)] * len(bounds)

    def begin() -> Visitor:
        between = np.empty((len(bounds), BLOCK))

        def look(pairs: Sequence[tuple[Array, Array]]) -> None:
            nonlocal zeros
            found, none = kernels.count_between(pairs, [(low, high) for low, high, _ in bounds], between)
            with lock:
                zeros += none
                for row, (number, *ends) in enumerate(found):
                    counts[row] += ends
                    parts[row].append(between[row, :number].copy())

        return look

    visit(begin, stored=True)
    ranks, found = wanted(zeros), []
    for rank, (low, high, _), (above, top, bottom), part in zip(ranks, bounds, counts, parts, strict=True):
        values, place = np.concatenate(part), rank - above
        if rank == 0 or place <= 0 or place > top + values.size + bottom:
            return ranks
        inside = top < place <= top + values.size
        found.append(_largest(values, place - top) if inside else high if place <= top else low)
    return tuple(found)


def visit_blocks(
    base: TensorFiles,
    policies: Sequence[Source],
    blocks: Sequence[Block],
    threads: int,
    begin: Callable[[], Visitor],
    ranked: TensorMerge | None = None,
    stored: bool = False,
) -> None:
    """Call `begin` in each thread, and its result with the residuals of every block.

    These are those of the policies, or the one that `ranked` makes of them. If `stored`, they are pairs of arrays whose
    difference counts.
    """

    def worker() -> Callable[[Block], None]:
        workspace, visit = Workspace(base, policies), begin()

        def work(block: Block) -> None:
            workspace.load(*block)
            if stored and not ranked:
                visit([workspace.pair(row) for row in range(len(policies))])
                return
            values = workspace.merged_residuals([ranked]) if ranked else workspace.residuals()
            visit([(workspace.nothing(), row) for row in values] if stored else values)

        return work

    share_out(blocks, worker, threads)


def _count(visit: Visit, prefixes: Sequence[int], shift: int, bits: int) -> Array:
    """Count for each policy the next bits of the magnitudes that begin with its prefix."""
    tables: list[Array] = []

    def begin() -> Visitor:
        counts = np.zeros((len(prefixes), 1 << bits), np.int64)
        tables.append(counts)

        def count(residuals: Array) -> None:
            for residual, prefix, table in zip(residuals, prefixes, counts, strict=True):
                kernels.count_magnitudes(residual, prefix, shift, bits, table)

        return count

    visit(begin)
    total: Array = np.sum(tables, axis=0)
    return total


def _collect(visit: Visit, prefixes: Sequence[int], shift: int) -> list[list[Array]]:
    """Return for each policy all magnitudes that begin with its prefix, in no particular order, an array a block."""
    parts: list[list[Array]] = [[] for _ in prefixes]

    def begin() -> Visitor:
        found = np.empty(BLOCK)

        def collect(residuals: Array) -> None:
            for residual, prefix, part in zip(residuals, prefixes, parts, strict=True):
                part.append(found[: kernels.collect_magnitudes(residual, prefix, shift, found)].copy())

        return collect

    visit(begin)
    return parts

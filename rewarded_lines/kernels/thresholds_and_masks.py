"""Which values of a residual a sparse method keeps: the largest (TIES), random (DARE, DELLA), unique ones (RAM)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import blake3
import numpy as np

from rewarded_lines.checkpoints.reader import TensorFiles
from rewarded_lines.kernels import kernels
from rewarded_lines.kernels.blocks import BLOCK, Array, Source, Workspace, all_blocks, blocks_of, pieces
from rewarded_lines.kernels.thread_pool import share_out

Block = tuple[str, int, int]
Visitor = Callable[[Array], None]
Visit = Callable[[Callable[[], Visitor]], None]
# Shift and number of the bits of each pass over float64 magnitudes. 2¹⁸ counts stay in cache.
_LEVELS = ((45, 18), (27, 18), (9, 18), (0, 9))
# So many values are ranked in memory, at most.
_HELD = 1 << 23


def kth_largest(
    base: TensorFiles,
    policies: Sequence[Source],
    names: Sequence[str],
    rank: int,
    threads: int = 0,
    ranked: Callable[[Array], Array] | None = None,
) -> tuple[float, ...]:
    """Return for each policy the `rank`-th largest |τ| of some tensors, which need not fit in memory.

    A radix selection: each pass over the files counts magnitudes by their next bits, from the top. The result is exact.

    Args:
        base: the SFT model.
        policies: each is ranked by itself.
        names: the tensors, ranked together.
        rank: from 1 to the number of values.
        threads: 0 for all cores.
        ranked: from the residuals of a block, [N, n], to the one row of values that are ranked in their place.
    """
    blocks, rows = list(all_blocks(names, base.tensors)), 1 if ranked else len(policies)
    visit = partial(_visit, base, policies, blocks, threads, ranked)
    ranks, prefixes = [rank] * rows, [0] * rows
    left, shift = [sum(count for _, _, count in blocks)] * rows, 63
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
    return tuple(
        float(np.partition(values, values.size - rank)[values.size - rank])
        for values, rank in zip(held, ranks, strict=True)
    )


def _visit(
    base: TensorFiles,
    policies: Sequence[Source],
    blocks: Sequence[Block],
    threads: int,
    ranked: Callable[[Array], Array] | None,
    begin: Callable[[], Visitor],
) -> None:
    """Call `begin` in each thread, and its result with the residuals, or what `ranked` makes of them, by block."""

    def worker() -> Callable[[Block], None]:
        workspace, visit = Workspace(base, policies), begin()

        def work(block: Block) -> None:
            workspace.load(*block)
            visit(ranked(workspace.residuals()) if ranked else workspace.residuals())

        return work

    share_out(blocks, worker, threads)


def _count(visit: Visit, prefixes: Sequence[int], shift: int, bits: int) -> Array:
    """Count for each policy the next bits of the magnitudes that begin with its prefix."""
    tables: list[Array] = []

    def begin() -> Visitor:
        counts = np.zeros((len(prefixes), 1 << bits), np.int64)
        tables.append(counts)

        def count(values: Array) -> None:
            for residual, prefix, row in zip(values, prefixes, counts, strict=True):
                kernels.count_magnitudes(residual, prefix, shift, bits, row)

        return count

    visit(begin)
    total: Array = np.sum(tables, axis=0)
    return total


def _collect(visit: Visit, prefixes: Sequence[int], shift: int) -> list[Array]:
    """Return for each policy all magnitudes that begin with its prefix, in no particular order."""
    parts: list[list[Array]] = [[] for _ in prefixes]

    def begin() -> Visitor:
        found = np.empty(BLOCK)

        def collect(values: Array) -> None:
            for residual, prefix, part in zip(values, prefixes, parts, strict=True):
                count = kernels.collect_magnitudes(residual, prefix, shift, found)
                part.append(found[:count].copy())

        return collect

    visit(begin)
    return [np.concatenate(part) for part in parts]


def overlap_ratios(
    base: TensorFiles,
    policies: Sequence[Source],
    names: Sequence[str],
    rows: Sequence[int],
    changed: float,
    threads: int = 0,
) -> dict[int, float]:
    """Return for each policy how many values it changed with others, over those it alone did; 0 without the latter.

    Args:
        base: the SFT model.
        policies: the inputs.
        names: the tensors, counted together.
        rows: the policies that count.
        changed: a value counts if |τ| is larger.
        threads: 0 for all cores.
    """
    tables: list[Array] = []

    def begin() -> Visitor:
        counts = np.zeros((2, len(rows)), np.int64)
        tables.append(counts)

        def count(residuals: Array) -> None:
            for piece in pieces(residuals):
                masks = np.abs(piece[list(rows)]) > changed
                several = masks.sum(axis=0) > 1
                counts[0] += (masks & several).sum(axis=1)
                counts[1] += (masks & ~several).sum(axis=1)

        return count

    _visit(base, policies, list(all_blocks(names, base.tensors)), threads, None, begin)
    shared, alone = sum(tables, np.zeros((2, len(rows)), np.int64)).tolist()
    return {row: several / one if one else 0.0 for row, several, one in zip(rows, shared, alone, strict=True)}


def ranked_masks(
    base: TensorFiles,
    policies: Sequence[Source],
    name: str,
    digests: Sequence[bytes],
    density: float,
    window: float,
    seed: int,
    start: int,
    count: int,
) -> Array:
    """Return 1/k where a value is kept, with probability k, else 0, for every policy, [N, count].

    k is that of `keep_chances`; see `uniform_numbers` for the rest. The masks are shared: leave them as they are.
    """
    shape = base.tensors[name].shape
    width = shape[-1] if shape else 1
    # Ranks need whole rows, of which a block may have parts.
    first, last = start // width * width, -(-(start + count) // width) * width
    workspace, masks = Workspace(base, policies), np.zeros((len(policies), count))
    residuals = np.empty((len(policies), last - first if window else 0))
    for place, length in blocks_of(residuals.shape[1]):
        workspace.load(name, first + place, length)
        residuals[:, place : place + length] = workspace.residuals()
    for residual, digest, mask in zip(residuals, digests, masks, strict=True):
        chances = np.full(count, density)
        if window:
            chances = keep_chances(residual.reshape(-1, width), density, window)[start - first :][:count]
        kept = uniform_numbers(seed, name, digest, start, count) < chances.astype(np.float32)
        np.divide(1.0, chances, out=mask, where=kept)
    return masks


def keep_chances(residual: Array, density: float, window: float) -> Array:
    """Return DELLA's probability to keep each value, by the rank of its magnitude in its row, flat.

    k = d − w/2 + w·(r − 1)/(n − 1) for the r-th smallest of n; d in a row of one value. Equal magnitudes are ranked in
    the order of their places.

    Args:
        residual: [rows, n].
        density: d.
        window: w.

    Source: DELLA-Merging, arXiv 2406.11617, section 3.1.
    """
    width = residual.shape[1]
    if width == 1:
        return np.full(residual.size, density)
    order = np.argsort(np.abs(residual), axis=1, kind="stable")
    chances = np.empty(residual.shape)
    steps = (density - window / 2) + window * (np.arange(width) / (width - 1))
    np.put_along_axis(chances, order, np.broadcast_to(steps, order.shape), axis=1)
    return chances.ravel()


# For several outputs of one merge: each draws the masks of the block that its thread works on.
@lru_cache(maxsize=64)
def random_mask(seed: int, name: str, digest: bytes, density: float, start: int, count: int) -> Any:
    """Return `count` booleans, each true with probability `density`, for a tensor's values from `start` on.

    See `uniform_numbers`. The mask is shared: leave it as it is.
    """
    mask: Array = uniform_numbers(seed, name, digest, start, count) < np.float32(density)
    return mask


def uniform_numbers(seed: int, name: str, digest: bytes, start: int, count: int) -> Array:
    """Return `count` float32 numbers from 0 up to 1, not including 1, for a tensor's values from `start` on.

    The key of the counter-based generator Philox is made from the seed, the tensor's name and `digest`, the hash of the
    policy's values. So the numbers do not depend on the order of policies, the sharding or the threads. `start` is a
    multiple of the block length, and `count` at most that.
    """
    assert start % BLOCK == 0 and count <= BLOCK
    key = blake3.blake3(f"{seed}:{name}:".encode() + digest).digest()
    words = np.frombuffer(key[:16], dtype="<u8")
    generator = np.random.Generator(np.random.Philox(key=words, counter=[0, 0, start // BLOCK, 0]))
    numbers: Array = generator.random(count, np.float32)
    return numbers

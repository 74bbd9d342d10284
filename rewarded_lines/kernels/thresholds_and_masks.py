"""Which values of a residual a sparse method keeps: the largest ones (TIES), or random ones (DARE)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import blake3
import numpy as np

from rewarded_lines.checkpoints.reader import TensorFiles
from rewarded_lines.kernels import kernels
from rewarded_lines.kernels.blocks import BLOCK, Array, Source, Workspace, all_blocks, pieces
from rewarded_lines.kernels.thread_pool import share_out

Block = tuple[str, int, int]
Visitor = Callable[[int, Array], None]
Visit = Callable[[Callable[[], Visitor]], None]
# Shift and number of the bits of each pass over float64 magnitudes. 2¹⁸ counts stay in cache.
_LEVELS = ((45, 18), (27, 18), (9, 18), (0, 9))
# So many values are ranked in memory, at most.
_HELD = 1 << 23


def kth_largest(
    base: TensorFiles, policies: Sequence[Source], names: Sequence[str], rank: int, threads: int = 0
) -> tuple[float, ...]:
    """Return for each policy the `rank`-th largest |τ| of some tensors, which need not fit in memory.

    A radix selection: each pass over the files counts magnitudes by their next bits, from the top. The result is exact.

    Args:
        base: the SFT model.
        policies: each is ranked by itself.
        names: the tensors, ranked together.
        rank: from 1 to the number of values.
        threads: 0 for all cores.
    """
    blocks = list(all_blocks(names, base.tensors))
    visit = partial(_visit, base, policies, blocks, threads)
    ranks, prefixes = [rank] * len(policies), [0] * len(policies)
    left, shift = [sum(count for _, _, count in blocks)] * len(policies), 63
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
    base: TensorFiles, policies: Sequence[Source], blocks: Sequence[Block], threads: int, begin: Callable[[], Visitor]
) -> None:
    """Call `begin` in each thread, and its result with each policy's index and residual, block by block."""

    def worker() -> Callable[[Block], None]:
        workspace, visit = Workspace(base, policies), begin()

        def work(block: Block) -> None:
            workspace.load(*block)
            for row, residual in enumerate(workspace.residuals()):
                visit(row, residual)

        return work

    share_out(blocks, worker, threads)


def _count(visit: Visit, prefixes: Sequence[int], shift: int, bits: int) -> Array:
    """Count for each policy the next bits of the magnitudes that begin with its prefix."""
    tables: list[Array] = []

    def begin() -> Visitor:
        counts = np.zeros((len(prefixes), 1 << bits), np.int64)
        tables.append(counts)
        return lambda row, residual: kernels.count_magnitudes(residual, prefixes[row], shift, bits, counts[row])

    visit(begin)
    total: Array = np.sum(tables, axis=0)
    return total


def _collect(visit: Visit, prefixes: Sequence[int], shift: int) -> list[Array]:
    """Return for each policy all magnitudes that begin with its prefix, in no particular order."""
    parts: list[list[Array]] = [[] for _ in prefixes]

    def begin() -> Visitor:
        found = np.empty(BLOCK)

        def collect(row: int, residual: Array) -> None:
            count = kernels.collect_magnitudes(residual, prefixes[row], shift, found)
            parts[row].append(found[:count].copy())

        return collect

    visit(begin)
    return [np.concatenate(part) for part in parts]


# For several outputs of one merge: each draws the masks of the block that its thread works on.
@lru_cache(maxsize=64)
def random_mask(seed: int, name: str, digest: bytes, density: float, start: int, count: int) -> Any:
    """Return `count` booleans, each true with probability `density`, for a tensor's values from `start` on.

    The key of the counter-based generator Philox is made from the seed, the tensor's name and `digest`, the hash of the
    policy's values. So the mask does not depend on the order of policies, the sharding or the threads. `start` is a
    multiple of the block length, and `count` at most that. The mask is shared: leave it as it is.
    """
    assert start % BLOCK == 0 and count <= BLOCK
    key = blake3.blake3(f"{seed}:{name}:".encode() + digest).digest()
    words = np.frombuffer(key[:16], dtype="<u8")
    generator = np.random.Generator(np.random.Philox(key=words, counter=[0, 0, start // BLOCK, 0]))
    mask = np.empty(count, np.bool_)
    for piece in pieces(mask):
        np.less(generator.random(piece.size, np.float32), np.float32(density), out=piece)
    return mask


class RandomMask(NamedTuple):
    """The mask of one policy's tensor, to be drawn block by block: see `random_mask`."""

    seed: int
    name: str
    digest: bytes
    density: float

    def __call__(self, start: int, count: int) -> Array:
        """Return `count` booleans for the values from `start` on."""
        drawn: Array = random_mask(*self, start, count)
        return drawn

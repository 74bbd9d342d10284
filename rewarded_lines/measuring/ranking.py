"""The k-th largest magnitude among values that do not fit in memory: a radix selection, exact, in few passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rewarded_lines.checkpoints.reader import TensorFiles
from rewarded_lines.streaming import kernels
from rewarded_lines.streaming.blocks import BLOCK, Source, Workspace, all_blocks
from rewarded_lines.streaming.pool import share_out

Array = np.ndarray[Any, Any]
Block = tuple[str, int, int]

# The bits of a float64's magnitude from the top: exponent and seven bits of mantissa, then the rest. A table of 2¹⁸
# counts stays in cache.
_LEVELS = ((45, 18), (27, 18), (9, 18), (0, 9))
# So few values are held in memory and ranked there.
_HELD = 1 << 23


def kth_largest(
    base: TensorFiles, policies: Sequence[Source], names: Sequence[str], rank: int, threads: int = 0
) -> tuple[float, ...]:
    """Return for each policy the `rank`-th largest |τ| over all values of some tensors.

    Args:
        base: the SFT model.
        policies: whose residuals are ranked, each by itself.
        names: of the tensors, ranked together.
        rank: from 1 to the number of values.
        threads: 0 for all cores.
    """
    blocks = list(all_blocks(names, base.tensors))
    ranks, prefixes = [rank] * len(policies), [0] * len(policies)
    left, shift = [sum(count for _, _, count in blocks)] * len(policies), 63
    for lower, bits in _LEVELS:
        if sum(left) <= _HELD:
            break
        counts = _count(base, policies, blocks, prefixes, lower, bits, threads)
        for row, table in enumerate(counts):
            # From the top: how many values lie in this bin or above it.
            above = np.cumsum(table[::-1])
            place = int(np.searchsorted(above, ranks[row]))
            ranks[row] -= int(above[place - 1]) if place else 0
            bin_ = len(table) - 1 - place
            prefixes[row], left[row] = (prefixes[row] << bits) | bin_, int(table[bin_])
        shift = lower
    if shift == 0:
        return tuple(float(value) for value in np.array(prefixes, np.uint64).view(np.float64))
    held = _collect(base, policies, blocks, prefixes, shift, threads)
    return tuple(
        float(np.partition(values, values.size - rank)[values.size - rank])
        for values, rank in zip(held, ranks, strict=True)
    )


def _count(
    base: TensorFiles,
    policies: Sequence[Source],
    blocks: Sequence[Block],
    prefixes: Sequence[int],
    shift: int,
    bits: int,
    threads: int,
) -> Array:
    """Return for each policy how many magnitudes that begin with its prefix have each value of the next bits."""
    tables: list[Array] = []

    def worker() -> Callable[[Block], None]:
        workspace = Workspace(base, policies)
        counts = np.zeros((len(policies), 1 << bits), np.int64)
        tables.append(counts)

        def work(block: Block) -> None:
            workspace.load(*block)
            for row, residual in enumerate(workspace.residuals()):
                kernels.count_magnitudes(residual, prefixes[row], shift, bits, counts[row])

        return work

    share_out(blocks, worker, threads)
    total: Array = np.sum(tables, axis=0)
    return total


def _collect(
    base: TensorFiles,
    policies: Sequence[Source],
    blocks: Sequence[Block],
    prefixes: Sequence[int],
    shift: int,
    threads: int,
) -> list[Array]:
    """Return for each policy all magnitudes that begin with its prefix, in no particular order."""
    parts: list[list[Array]] = [[] for _ in policies]

    def worker() -> Callable[[Block], None]:
        workspace, found = Workspace(base, policies), np.empty(BLOCK)

        def work(block: Block) -> None:
            workspace.load(*block)
            for row, residual in enumerate(workspace.residuals()):
                count = kernels.collect_magnitudes(residual, prefixes[row], shift, found)
                parts[row].append(found[:count].copy())

        return work

    share_out(blocks, worker, threads)
    return [np.concatenate(part) for part in parts]

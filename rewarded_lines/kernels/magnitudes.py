"""Magnitudes of residuals that need not fit in memory: passes that count or collect some, and the largest of a few."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from rewarded_lines.checkpoints.reader import TensorFiles
from rewarded_lines.kernels import kernels
from rewarded_lines.kernels.blocks import BLOCK, Array, Source, Workspace, all_blocks
from rewarded_lines.kernels.measures import SPARE
from rewarded_lines.kernels.tensor_merge import TensorMerge
from rewarded_lines.kernels.thread_pool import share_out

Block = tuple[str, int, int]
# So many values are ranked in memory, at most.
HELD = 1 << 23
# Fewer are put in order by numpy; more are counted by so many bits first.
_ORDERED, _DIGIT = 1 << 12, 11


@dataclass(frozen=True)
class Magnitudes:
    """|τ| of each policy in some tensors, in rows; or one row of what a rule makes of the residuals.

    Attributes:
        base: the SFT model.
        policies: the inputs.
        names: the tensors.
        threads: 0 for all cores.
        rule: it is ≥ 0.
    """

    base: TensorFiles
    policies: Sequence[Source]
    names: Sequence[str]
    threads: int
    rule: TensorMerge | None = None

    @property
    def rows(self) -> int:
        """Return how many rows there are."""
        return 1 if self.rule else len(self.policies)

    @cached_property
    def blocks(self) -> Sequence[Block]:
        """Return name, start and length of each block."""
        return list(all_blocks(self.names, self.base.tensors))

    @property
    def total(self) -> int:
        """Return how many values a row has."""
        return sum(count for _, _, count in self.blocks)

    def count(self, prefixes: Sequence[int], shift: int, bits: int) -> Array:
        """Count for each row the next bits of the magnitudes that begin with its prefix, [rows, 2^bits]."""
        tables: list[Array] = []

        def begin() -> Callable[[Array], None]:
            counts = np.zeros((len(prefixes), 1 << bits), np.int64)
            tables.append(counts)

            def count(residuals: Array) -> None:
                for residual, prefix, table in zip(residuals, prefixes, counts, strict=True):
                    kernels.count_magnitudes(residual, prefix, shift, bits, table)

            return count

        self._visit(begin, self.blocks)
        total: Array = np.sum(tables, axis=0)
        return total

    def collect(self, prefixes: Sequence[int], shift: int) -> list[list[Array]]:
        """Return for each row all magnitudes that begin with its prefix, in no particular order, an array a block."""
        parts: list[list[Array]] = [[] for _ in prefixes]

        def begin() -> Callable[[Array], None]:
            found = np.empty(BLOCK + SPARE)

            def collect(residuals: Array) -> None:
                for residual, prefix, part in zip(residuals, prefixes, parts, strict=True):
                    part.append(found[: kernels.collect_magnitudes(residual, prefix, shift, found)].copy())

            return collect

        self._visit(begin, self.blocks)
        return parts

    def all_of(self, blocks: Sequence[Block]) -> list[list[Array]]:
        """Return for each row all magnitudes of some blocks or parts of them, likewise."""
        parts: list[list[Array]] = [[] for _ in range(self.rows)]

        def take(residuals: Array) -> None:
            for residual, part in zip(residuals, parts, strict=True):
                part.append(np.abs(residual))

        self._visit(lambda: take, blocks)
        return parts

    def _visit(self, begin: Callable[[], Callable[[Array], None]], blocks: Sequence[Block]) -> None:
        """Call `begin` in each thread, and its result with the rows of every block, with their signs."""

        def worker() -> Callable[[Block], None]:
            workspace, visit = Workspace(self.base, self.policies), begin()

            def work(block: Block) -> None:
                workspace.load(*block)
                visit(workspace.merged_residuals([self.rule]) if self.rule else workspace.residuals())

            return work

        share_out(blocks, worker, self.threads)


def largest(values: Array, rank: int) -> float:
    """Return the value of a rank, from 1, the largest; all ≥ 0. What has its upper bits is looked at further."""
    while values.size > _ORDERED:
        # Patterns are in the order of magnitudes, a NaN above infinity.
        least, most = int(values.view(np.int64).min()), int(values.view(np.int64).max())
        shift = max(0, (least ^ most).bit_length() - _DIGIT)
        prefix, counts = most >> (shift + _DIGIT), np.zeros(1 << _DIGIT, np.int64)
        kernels.count_magnitudes(values, prefix, shift, _DIGIT, counts)
        bin_, rank = bin_of(counts, rank)
        prefix = (prefix << _DIGIT) | bin_
        if shift == 0:
            return float(np.array(prefix, np.uint64).view(np.float64))
        found = np.empty(values.size + SPARE)
        values = found[: kernels.collect_magnitudes(values, prefix, shift, found)]
    return float(np.partition(values, values.size - rank)[values.size - rank])


def bin_of(counts: Array, rank: int) -> tuple[int, int]:
    """Return the bin that has the value of a rank, and the value's rank within it."""
    # above[i]: how many values lie in the highest i + 1 bins.
    above = np.cumsum(counts[::-1])
    place = int(np.searchsorted(above, rank))
    return counts.size - 1 - place, rank - (int(above[place - 1]) if place else 0)

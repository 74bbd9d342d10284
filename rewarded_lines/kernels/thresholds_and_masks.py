"""Which values of a residual a sparse method keeps: random ones (DARE, DELLA), unique ones (RAM)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import blake3
import numpy as np

from rewarded_lines.checkpoints.reader import TensorFiles
from rewarded_lines.kernels import kernels, numpy_kernels
from rewarded_lines.kernels.blocks import BLOCK, Array, Source, Workspace
from rewarded_lines.kernels.measures import measure, note_overlaps
from rewarded_lines.kernels.rule_programs import Notes
from rewarded_lines.kernels.tensor_merge import Run


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
    if not rows:
        return {}
    counters: list[_Overlaps] = []

    def begin() -> _Overlaps:
        counters.append(_Overlaps(rows, changed))
        return counters[-1]

    def note(notes: Notes, residuals: Sequence[Any]) -> None:
        note_overlaps(notes, [residuals[row] for row in rows])

    measure(base, policies, names, threads, begin, note, [changed])
    shared, alone = sum((each.counts for each in counters), np.zeros((2, len(rows)), np.int64)).tolist()
    return {row: several / one if one else 0.0 for row, several, one in zip(rows, shared, alone, strict=True)}


class _Overlaps:
    """Counts what `numpy_kernels.count_overlaps` counts."""

    def __init__(self, rows: Sequence[int], changed: float) -> None:
        self.counts, self._run = np.zeros((2, 2, len(rows)), np.int64)
        self._rows, self._changed = rows, changed
        self.targets = list(self._run.reshape(-1, 1))

    def take(self, _: int) -> None:
        """See `Counter`."""
        shared, large = self._run
        self.counts += shared, large - shared

    def clear(self) -> None:
        """See `Counter`."""
        self._run[:] = 0

    def look(self, workspace: Workspace) -> None:
        """See `Counter`."""
        pairs = [workspace.pair(row) for row in self._rows]
        with np.errstate(all="ignore"):
            numpy_kernels.count_overlaps(pairs, self._changed, self.counts)


def uniform_numbers(seed: int, name: str, digest: bytes, start: int, count: int) -> Array:
    """Return `count` whole numbers below 2²⁴, all equally probable, as float32.

    The key of the counter-based generator Philox is made from the seed, the tensor's name and `digest`, the hash of the
    policy's values. So the numbers do not depend on the order of policies, the sharding or the threads. `start` is a
    multiple of the block length, and `count` at most that.
    """
    assert start % BLOCK == 0 and count <= BLOCK
    # Of plain numbers, numpy would make an array of float64 if only one is beyond int64.
    key, counter = np.array(_key(seed, name, digest), np.uint64), [0, 0, start // BLOCK, 0]
    generator = np.random.Generator(np.random.Philox(key=key, counter=counter))
    numbers: Array = generator.random(count, np.float32)
    numbers *= np.float32(2**24)
    return numbers


@lru_cache(maxsize=64)
def _key(seed: int, name: str, digest: bytes) -> tuple[int, int]:
    """Return the two halves of the generator's key."""
    halves = np.frombuffer(blake3.blake3(f"{seed}:{name}:".encode() + digest).digest()[:16], dtype="<u8")
    return int(halves[0]), int(halves[1])


@dataclass(frozen=True)
class RandomMask:
    """The mask of one policy's tensor: true with probability `density`."""

    seed: int
    name: str
    digest: bytes
    density: float
    dtype: ClassVar[np.dtype[Any]] = np.dtype(np.bool_)

    @property
    def words(self) -> tuple[int, int, int]:
        """See `Mask`."""
        return *_key(self.seed, self.name, self.digest), BLOCK.bit_length() - 1

    @property
    def ranked(self) -> tuple[int, int] | None:
        """See `Mask`."""
        return None

    def chosen(self, numbers: Any, ranks: Any) -> Any:
        """See `Mask`."""
        return numbers < math.ceil(np.float32(self.density) * 2.0**24)

    def ranks(self, run: Run, start: int, out: Array) -> None:
        """Need no ranks."""

    def __call__(self, run: Run, start: int, out: Array) -> None:
        """Fill `out` with the mask from `start` on."""
        numbers = uniform_numbers(self.seed, self.name, self.digest, start, out.size)
        ranks = np.empty(out.size if self.ranked else 0, np.uint32)
        self.ranks(run, start, ranks)
        out[:] = self.chosen(numbers, ranks.astype(np.float64))


@dataclass(frozen=True)
class RankedMask(RandomMask):
    """DELLA's mask of one policy's tensor: 1/k where a value is kept, with probability k, else 0.

    k = d − w/2 + w·(r − 1)/(n − 1) for the r-th smallest magnitude of a row of n; d in a row of one value. Equal
    magnitudes are ranked in the order of their places.

    Source: DELLA-Merging, arXiv 2406.11617, section 3.1.
    """

    window: float
    width: int
    row: int
    dtype: ClassVar[np.dtype[Any]] = np.dtype(np.float64)

    @property
    def ranked(self) -> tuple[int, int] | None:
        """See `Mask`; without a window all have one probability."""
        return (self.row, self.width) if self.width > 1 and self.window > 0 else None

    def chosen(self, numbers: Any, ranks: Any) -> Any:
        """See `Mask`."""
        if not self.ranked:
            return (numbers < math.ceil(np.float32(self.density) * 2.0**24)) * (1.0 / self.density)
        chances = (self.density - self.window / 2) + self.window * (ranks / (self.width - 1))
        return (1.0 / chances) * (numbers < chances.astype(np.float32) * 2.0**24)

    def ranks(self, run: Run, start: int, out: Array) -> None:
        """Fill `out` with r − 1 of each value from `start` on."""
        # Ranks need whole rows, of which a block may have parts.
        first, last = start // self.width * self.width, -(-(start + out.size) // self.width) * self.width
        base, policy = run(self.row, first, last)
        kernels.rank_rows(base, policy, self.width, start - first, out)

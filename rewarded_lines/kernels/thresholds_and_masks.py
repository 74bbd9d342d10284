"""Which values of a residual a sparse method keeps: random ones (DARE, DELLA), unique ones (RAM)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, ClassVar

import blake3
import numpy as np

from rewarded_lines.checkpoints.reader import TensorFiles
from rewarded_lines.kernels import kernels
from rewarded_lines.kernels.blocks import BLOCK, Array, Source, all_blocks
from rewarded_lines.kernels.kth_largest import Visitor, visit_blocks
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
    tables: list[Array] = []

    def begin() -> Visitor:
        tables.append(np.zeros((2, len(rows)), np.int64))
        return partial(kernels.count_overlaps, rows=np.array(rows), changed=changed, counts=tables[-1])

    visit_blocks(base, policies, list(all_blocks(names, base.tensors)), threads, begin)
    shared, alone = sum(tables, np.zeros((2, len(rows)), np.int64)).tolist()
    return {row: several / one if one else 0.0 for row, several, one in zip(rows, shared, alone, strict=True)}


def keep_chances(width: int, density: float, window: float) -> Array:
    """Return DELLA's probability to keep a value, by the rank of its magnitude in its row.

    k = d − w/2 + w·(r − 1)/(n − 1) for the r-th smallest of n; d in a row of one value. Equal magnitudes are ranked in
    the order of their places.

    Args:
        width: n.
        density: d.
        window: w.

    Source: DELLA-Merging, arXiv 2406.11617, section 3.1.
    """
    if width == 1:
        return np.full(1, density)
    return (density - window / 2) + window * (np.arange(width) / (width - 1))


def random_mask(seed: int, name: str, digest: bytes, density: float, start: int, count: int) -> Array:
    """Return `count` booleans, each true with probability `density`, for a tensor's values from `start` on.

    The key of the counter-based generator Philox is made from the seed, the tensor's name and `digest`, the hash of the
    policy's values. So the numbers do not depend on the order of policies, the sharding or the threads. `start` is a
    multiple of the block length, and `count` at most that.
    """
    mask = np.empty(-(-count // 8) * 8, np.bool_)
    kernels.keep_random(mask, *_key(seed, name, digest, start, count), math.ceil(np.float32(density) * 2.0**24))
    return mask[:count]


def uniform_numbers(seed: int, name: str, digest: bytes, start: int, count: int) -> Array:
    """Return `count` uint32 numbers below 2²⁴, all equally probable, by the generator of `random_mask`."""
    numbers = np.empty(-(-count // 8) * 8, np.uint32)
    kernels.draw_numbers(numbers, *_key(seed, name, digest, start, count))
    return numbers[:count]


def _key(seed: int, name: str, digest: bytes, start: int, count: int) -> tuple[int, int, int]:
    """Return the two halves of the generator's key for a block, and the block's number."""
    assert start % BLOCK == 0 and count <= BLOCK
    first, second = np.frombuffer(blake3.blake3(f"{seed}:{name}:".encode() + digest).digest()[:16], dtype="<u8")
    return first, second, start // BLOCK


@dataclass(frozen=True)
class RandomMask:
    """The mask of one policy's tensor: see `random_mask`."""

    seed: int
    name: str
    digest: bytes
    density: float
    dtype: ClassVar[np.dtype[Any]] = np.dtype(np.bool_)

    def __call__(self, run: Run, start: int, out: Array) -> None:
        """Fill `out` with the mask from `start` on."""
        out[:] = random_mask(self.seed, self.name, self.digest, self.density, start, out.size)


@dataclass(frozen=True)
class RankedMask:
    """DELLA's mask of one policy's tensor: 1/k where a value is kept, with probability k, else 0.

    k is that of `keep_chances`; see `random_mask` for the rest.
    """

    seed: int
    name: str
    digest: bytes
    density: float
    window: float
    width: int
    row: int
    dtype: ClassVar[np.dtype[Any]] = np.dtype(np.float64)

    def __call__(self, run: Run, start: int, out: Array) -> None:
        """Fill `out` with the mask from `start` on."""
        numbers = uniform_numbers(self.seed, self.name, self.digest, start, out.size)
        limits, factors = _by_rank(self.width, self.density, self.window)
        if limits.size == 1:
            out[:] = (numbers < limits) * factors
            return
        # Ranks need whole rows, of which a block may have parts.
        first, last = start // self.width * self.width, -(-(start + out.size) // self.width) * self.width
        kernels.keep_ranked(*run(self.row, first, last), self.width, numbers, limits, factors, start - first, out)


@lru_cache(maxsize=8)
def _by_rank(width: int, density: float, window: float) -> tuple[Array, Array]:
    """Return for each rank below which of 2²⁴ numbers a value is kept, and 1/k; one of each if all have one k."""
    chances = keep_chances(width if window else 1, density, window)
    return np.ceil(chances.astype(np.float32) * 2.0**24).astype(np.uint32), 1.0 / chances

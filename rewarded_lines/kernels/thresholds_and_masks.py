"""Which values of a residual a sparse method keeps: random ones (DARE, DELLA), unique ones (RAM)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import blake3
import numpy as np

from rewarded_lines.checkpoints.reader import TensorFiles
from rewarded_lines.kernels import kernels
from rewarded_lines.kernels.blocks import BLOCK, Array, Source, Workspace, all_blocks, blocks_of, pieces
from rewarded_lines.kernels.kth_largest import Visitor, visit_blocks


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

    visit_blocks(base, policies, list(all_blocks(names, base.tensors)), threads, begin)
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
    first, second = _key(seed, name, digest, start, count)
    mask = np.empty(-(-count // 8) * 8, np.bool_)
    kernels.keep_random(mask, first, second, start // BLOCK, math.ceil(np.float32(density) * 2.0**24))
    return mask[:count]


def uniform_numbers(seed: int, name: str, digest: bytes, start: int, count: int) -> Array:
    """Return `count` float32 numbers from 0 up to 1, not including 1, for a tensor's values from `start` on.

    The key of the counter-based generator Philox is made from the seed, the tensor's name and `digest`, the hash of the
    policy's values. So the numbers do not depend on the order of policies, the sharding or the threads. `start` is a
    multiple of the block length, and `count` at most that.
    """
    words = _key(seed, name, digest, start, count)
    generator = np.random.Generator(np.random.Philox(key=words, counter=[0, 0, start // BLOCK, 0]))
    numbers: Array = generator.random(count, np.float32)
    return numbers


def _key(seed: int, name: str, digest: bytes, start: int, count: int) -> Array:
    """Return the two halves of the generator's key, for a block."""
    assert start % BLOCK == 0 and count <= BLOCK
    return np.frombuffer(blake3.blake3(f"{seed}:{name}:".encode() + digest).digest()[:16], dtype="<u8")


@dataclass(frozen=True)
class RandomMask:
    """The mask of one policy's tensor, to be drawn block by block: see `random_mask`."""

    seed: int
    name: str
    digest: bytes
    density: float
    dtype: ClassVar[np.dtype[Any]] = np.dtype(np.bool_)

    def __call__(self, start: int, count: int) -> Array:
        """Return the mask of `count` values from `start` on."""
        drawn: Array = random_mask(self.seed, self.name, self.digest, self.density, start, count)
        return drawn


@dataclass(frozen=True)
class RankedMask:
    """Likewise DELLA's mask, a row of those that `draw` makes of these arguments: see `ranked_masks`."""

    draw: Callable[..., Array]
    given: tuple[Any, ...]
    row: int
    dtype: ClassVar[np.dtype[Any]] = np.dtype(np.float64)

    def __call__(self, start: int, count: int) -> Array:
        """Return the mask of `count` values from `start` on."""
        drawn: Array = self.draw(*self.given, start, count)[self.row]
        return drawn

"""How far policies are from their base and from one another, measured block by block in one pass over the files.

Counts are exact, and sums over blocks are too, so no number depends on threads or sharding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from rewarded_lines.checkpoints.headers import TensorInfo
from rewarded_lines.checkpoints.reader import TensorFiles, total_bytes
from rewarded_lines.kernels import kernels
from rewarded_lines.kernels.blocks import Array, Source, Workspace, all_blocks
from rewarded_lines.kernels.norms import exact_sum
from rewarded_lines.kernels.thread_pool import share_out
from rewarded_lines.progress import Progress


@dataclass(frozen=True)
class Distance:
    """The residuals τ₁ … τ_N of N policies over a block, a tensor or several.

    Attributes:
        base: Σ θ_base².
        products: the scalar products τᵢ·τⱼ, [N, N].
        both: how many values i and j both changed, [N, N]; on the diagonal how many i changed.
        agreeing: how many of these they changed with the same sign, [N, N].
        alone: how many values only policy i changed, [N].
        changed: how many values at least one policy changed.
        values: how many values there are.
        nonfinite: how many are not finite, in the base and in every policy.
    """

    base: float
    products: Array
    both: Array
    agreeing: Array
    alone: Array
    changed: int
    values: int
    nonfinite: int = 0

    def norm(self, i: int) -> float:
        """Return ‖τᵢ‖."""
        return math.sqrt(self.products[i, i])

    def cosine(self, i: int, j: int) -> float | None:
        """Return τᵢ·τⱼ/(‖τᵢ‖‖τⱼ‖), None if a residual is zero or not finite."""
        size = self.norm(i) * self.norm(j)
        return min(1.0, max(-1.0, float(self.products[i, j]) / size)) if 0 < size < math.inf else None

    def overlap(self, i: int, j: int) -> float | None:
        """Return the Jaccard index of the changed sets: changed by both over changed by i or j."""
        return _share(self.both[i, j], self.both[i, i] + self.both[j, j] - self.both[i, j])

    def agreement(self, i: int, j: int) -> float | None:
        """Return the share of equal signs among the values that both changed."""
        return _share(self.agreeing[i, j], self.both[i, j])

    def share(self, i: int) -> float | None:
        """Return the share of the values that policy i changed."""
        return _share(self.both[i, i], self.values)

    def unique(self, i: int) -> float | None:
        """Return the share of policy i's changed values that no other policy changed."""
        return _share(self.alone[i], self.both[i, i])


def distances(
    base: TensorFiles, sources: Sequence[Source], infos: Mapping[str, TensorInfo], progress: Progress
) -> dict[str, Distance]:
    """Return how far each floating-point tensor of `infos` is from the base's in every source."""
    names = [name for name, info in infos.items() if info.dtype.floating]
    # A tensor without values has no block.
    parts = {name: [_nothing(len(sources))] for name in names}
    progress.expect(total_bytes(infos[name] for name in names))
    progress.start("reading blocks", counted=True)

    def measure(workspace: Workspace, name: str, _: int, count: int) -> None:
        parts[name].append(_measure_block(workspace, np.empty(count)))
        progress.advance(count * infos[name].dtype.itemsize)

    visit_blocks(lambda: Workspace(base, sources), [infos[name] for name in names], measure)
    return {name: joined(blocks) for name, blocks in parts.items()}


def visit_blocks(
    begin: Callable[[], Workspace], infos: Iterable[TensorInfo], visit: Callable[[Workspace, str, int, int], None]
) -> None:
    """Call `visit` for every block of some tensors, with the workspace that holds it, name, start and length.

    Threads share the blocks; `begin` makes a thread's workspace.
    """

    def worker() -> Callable[[tuple[str, int, int]], None]:
        workspace = begin()

        def work(block: tuple[str, int, int]) -> None:
            workspace.load(*block)
            visit(workspace, *block)

        return work

    tensors = {info.name: info for info in infos}
    share_out(all_blocks(tensors, tensors), worker)


def joined(parts: Iterable[Distance]) -> Distance:
    """Return the distance over several blocks or tensors together, at least one; sums are exact."""
    listed = list(parts)
    count = len(listed[0].alone)
    products = [[exact_sum(one.products[i, j] for one in listed) for j in range(count)] for i in range(count)]
    return Distance(
        exact_sum(one.base for one in listed),
        np.array(products),
        *(sum(getattr(one, name) for one in listed) for name in ("both", "agreeing", "alone")),
        *(sum(getattr(one, name) for one in listed) for name in ("changed", "values", "nonfinite")),
    )


def _nothing(count: int) -> Distance:
    square, row = np.zeros((count, count), np.int64), np.zeros(count, np.int64)
    return Distance(0.0, np.zeros((count, count)), square, square, row, 0, 0)


def _measure_block(workspace: Workspace, wide: Array) -> Distance:
    residuals = workspace.residuals()
    count = len(residuals)
    products, both, agreeing = np.zeros((count, count)), *np.zeros((2, count, count), np.int64)
    # Values that are not finite are counted and reported in the notes.
    with np.errstate(all="ignore"):
        changed = residuals != 0
        for i, residual in enumerate(residuals):
            products[i, i] = np.multiply(residual, residual, out=wide).sum()
            both[i, i] = agreeing[i, i] = np.count_nonzero(changed[i])
        for i, j in combinations(range(count), 2):
            products[i, j] = products[j, i] = np.multiply(residuals[i], residuals[j], out=wide).sum()
            shared = changed[i] & changed[j]
            both[i, j] = both[j, i] = np.count_nonzero(shared)
            # Not the sign of the product, which may be too small for float64.
            shared &= np.signbit(residuals[i]) == np.signbit(residuals[j])
            agreeing[i, j] = agreeing[j, i] = np.count_nonzero(shared)
        by = changed.sum(axis=0, dtype=np.uint16)
        alone = np.array([np.count_nonzero(mine & (by == 1)) for mine in changed])
        kernels.cast(workspace.values(0), wide)
        base = float(np.multiply(wide, wide, out=wide).sum())
    finite = math.isfinite(base) and np.isfinite(products).all()
    nonfinite = 0 if finite else sum(workspace.count_nonfinite(row) for row in range(count + 1))
    return Distance(base, products, both, agreeing, alone, int(np.count_nonzero(by)), wide.size, nonfinite)


def _share(part: int, whole: int) -> float | None:
    return float(part / whole) if whole else None

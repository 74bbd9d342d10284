"""Numbers about whole tensors: norms, scalar products, thresholds and digests, measured block by block.

Sums over blocks are exact, so no number depends on threads or sharding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import blake3
import numpy as np

from rewarded_lines.checkpoints.reader import TensorFiles
from rewarded_lines.kernels.blocks import Source, TensorMerge, Workspace, blocks_of, pieces
from rewarded_lines.kernels.thread_pool import share_out
from rewarded_lines.kernels.thresholds_and_masks import kth_largest

Gram = tuple[tuple[float, ...], ...]


def exact_sum(terms: Iterable[float]) -> float:
    """Return the exact sum, rounded once; infinite or NaN if a term is."""
    listed = list(terms)
    try:
        return math.fsum(listed)
    except (OverflowError, ValueError):
        # A partial sum beyond float64's range, or infinities of both signs.
        return sum(listed)


class Facts:
    """Numbers about whole tensors that rules need; measured on first use and kept. None depends on λ."""

    def __init__(self, base: TensorFiles, policies: Sequence[Source], names: Sequence[str]) -> None:
        """Bind the inputs and the names of the floating-point tensors to merge; nothing is read yet."""
        self._base = base
        self._policies = policies
        self._names = names
        self._digests: dict[str, tuple[bytes, ...]] = {}
        self._grams: dict[str, Gram] = {}
        self._thresholds: dict[tuple[str, float], tuple[float, ...]] = {}

    def digests(self, name: str) -> tuple[bytes, ...]:
        """Return the BLAKE3 digest of a tensor's values in each policy."""
        if name not in self._digests:
            hashes = [blake3.blake3() for _ in self._policies]
            for workspace in self._passing(name):
                for row, digest in enumerate(hashes):
                    raw = workspace.raw(row + 1)
                    digest.update((workspace.residuals()[row] if raw is None else raw).view(np.uint8).data)
            self._digests[name] = tuple(digest.digest() for digest in hashes)
        return self._digests[name]

    def gram(self, name: str) -> Gram:
        """Return the scalar products τ_i·τ_j of a whole tensor."""
        if name not in self._grams:
            rows = range(len(self._policies))
            parts: list[list[list[float]]] = [[[] for _ in rows] for _ in rows]
            for workspace in self._passing(name):
                residuals = workspace.residuals()
                for i in rows:
                    for j in rows:
                        parts[i][j].append(float(np.einsum("n,n->", residuals[i], residuals[j])))
            self._grams[name] = tuple(tuple(map(exact_sum, row)) for row in parts)
        return self._grams[name]

    def thresholds(self, name: str, density: float, scope: str) -> tuple[float, ...]:
        """Return for each policy the k-th largest |τ_i|, k = max(1, ⌊density·n⌋), of the n values of a tensor.

        With the scope "model", n counts the values of all tensors. A rule keeps all values ≥ the threshold.
        """
        key = ("" if scope == "model" else name, density)
        if key not in self._thresholds:
            names = self._names if scope == "model" else [name]
            total = sum(self._base.tensors[each].elements for each in names)
            if total == 0 or density == 1:
                self._thresholds[key] = (0.0,) * len(self._policies)
            else:
                # Several tensors are measured at the same time, so each in one thread.
                rank, threads = max(1, int(density * total)), int(scope == "tensor")
                self._thresholds[key] = kth_largest(self._base, self._policies, names, rank, threads)
        return self._thresholds[key]

    def prepare(self, measures: Iterable[Callable[[str], object]]) -> None:
        """Measure every tensor, several at the same time, before the stream needs the numbers."""

        def work(item: tuple[Callable[[str], object], str]) -> None:
            measure, name = item
            measure(name)

        share_out([(measure, name) for measure in measures for name in self._names], lambda: work)

    def norms(
        self, merges: Callable[[str], Sequence[TensorMerge]], order: Callable[[str], Sequence[int]]
    ) -> list[tuple[float, float]]:
        """Return ‖Σ τ_i‖₁ and ‖τ_merged‖₁ over all tensors, for each output.

        Args:
            merges: from a tensor's name to how each output's tensor is made.
            order: from a tensor's name to the order in which the policies' residuals are summed.
        """
        parts: dict[str, list[tuple[float, float]]] = {}

        def work(name: str) -> None:
            parts[name] = self._norms(name, merges(name), list(order(name)))

        share_out(self._names, lambda: work)
        return [_summed(pairs) for pairs in zip(*(parts[name] for name in self._names), strict=True)]

    def _norms(self, name: str, steps: Sequence[TensorMerge], order: list[int]) -> list[tuple[float, float]]:
        parts: list[list[tuple[float, float]]] = [[] for _ in steps]
        for workspace in self._passing(name):
            together = exact_sum(
                float(np.abs(residuals[order].sum(axis=0)).sum()) for residuals in pieces(workspace.residuals())
            )
            for step, sums in zip(steps, parts, strict=True):
                sums.append((together, _norm(workspace, step)))
        return [_summed(sums) for sums in parts]

    def _passing(self, name: str) -> Iterator[Workspace]:
        workspace = Workspace(self._base, self._policies)
        for start, count in blocks_of(self._base.tensors[name].elements):
            workspace.load(name, start, count)
            yield workspace


def _norm(workspace: Workspace, step: TensorMerge) -> float:
    merged = pieces(workspace.merged_residual(step)) if step.rows else ()
    return exact_sum(float(np.abs(piece).sum()) for piece in merged)


def _summed(pairs: Iterable[tuple[float, float]]) -> tuple[float, float]:
    listed = list(pairs)
    return exact_sum(first for first, _ in listed), exact_sum(second for _, second in listed)

"""What a rule must know of whole tensors before their blocks can pass: angles, thresholds, a canonical order, norms.

Nothing here depends on λ, so several outputs share it. Sums are exact or of integers: the numbers are
the same for any number of threads and any sharding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import blake3
import numpy as np

from rewarded_lines.checkpoints.reader import TensorFiles
from rewarded_lines.measuring.ranking import kth_largest
from rewarded_lines.measuring.sums import exact_sum
from rewarded_lines.streaming.blocks import Source, TensorMerge, Workspace, blocks_of, pieces
from rewarded_lines.streaming.pool import share_out

Gram = tuple[tuple[float, ...], ...]


class Facts:
    """Measures tensors on demand and remembers what it found."""

    def __init__(self, base: TensorFiles, policies: Sequence[Source], names: Sequence[str]) -> None:
        """Bind the inputs; nothing is read yet.

        Args:
            base: the SFT model.
            policies: in the order of the weights.
            names: of the floating-point tensors that are merged.
        """
        self._base = base
        self._policies = policies
        self._names = names
        self._digests: dict[str, tuple[bytes, ...]] = {}
        self._grams: dict[str, Gram] = {}
        self._thresholds: dict[tuple[str, float], tuple[float, ...]] = {}

    def digests(self, name: str) -> tuple[bytes, ...]:
        """Return the BLAKE3 digest of a tensor's values in each policy: who it is, whatever its file and place."""
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
            count = len(self._policies)
            parts: list[list[list[float]]] = [[[] for _ in range(count)] for _ in range(count)]
            for workspace in self._passing(name):
                residuals = workspace.residuals()
                for i in range(count):
                    for j in range(count):
                        parts[i][j].append(float(np.einsum("n,n->", residuals[i], residuals[j])))
            self._grams[name] = tuple(tuple(exact_sum(part) for part in row) for row in parts)
        return self._grams[name]

    def thresholds(self, name: str, density: float, scope: str) -> tuple[float, ...]:
        """Return for each policy the magnitude of the k-th largest value of τ_i, k = ⌊density·n⌋ but at least 1.

        Args:
            name: of the tensor.
            density: share of the values to keep; those as large as the threshold are all kept.
            scope: "tensor" or "model", what n counts and the ranking is over.
        """
        key = ("" if scope == "model" else name, density)
        if key not in self._thresholds:
            names = self._names if scope == "model" else [name]
            total = sum(self._base.tensors[each].elements for each in names)
            nothing = total == 0 or density == 1
            # Tensors are measured side by side, so each by one thread.
            found = (
                (0.0,) * len(self._policies)
                if nothing
                else kth_largest(
                    self._base, self._policies, names, max(1, int(density * total)), threads=int(scope == "tensor")
                )
            )
            self._thresholds[key] = found
        return self._thresholds[key]

    def prepare(self, measures: Iterable[Callable[[str], object]]) -> None:
        """Measure every tensor, several at a time, so that the stream finds all it needs."""
        work = [(measure, name) for measure in measures for name in self._names]
        share_out(work, lambda: lambda item: (item[0](item[1]), None)[1])

    def norms(
        self, merges: Callable[[str], Sequence[TensorMerge]], order: Callable[[str], Sequence[int]]
    ) -> list[tuple[float, float]]:
        """Return ‖Σ τ_i‖₁ and ‖τ_merged‖₁ over all tensors, for each output.

        Args:
            merges: what every output wants of a tensor.
            order: in which order the policies' residuals of a tensor are summed.
        """
        parts: dict[str, list[tuple[float, float]]] = {}

        def work(name: str) -> None:
            parts[name] = self._norms(name, merges(name), list(order(name)))

        share_out(self._names, lambda: work)
        outputs = zip(*(parts[name] for name in self._names), strict=True)
        return [(exact_sum(total for total, _ in pairs), exact_sum(joined for _, joined in pairs)) for pairs in outputs]

    def _norms(self, name: str, steps: Sequence[TensorMerge], order: list[int]) -> list[tuple[float, float]]:
        parts: list[list[tuple[float, float]]] = [[] for _ in steps]
        for workspace in self._passing(name):
            together = exact_sum(
                float(np.abs(residuals[order].sum(axis=0)).sum()) for residuals in pieces(workspace.residuals())
            )
            for step, sums in zip(steps, parts, strict=True):
                sums.append((together, _norm(workspace, step)))
        return [(exact_sum(a for a, _ in sums), exact_sum(b for _, b in sums)) for sums in parts]

    def _passing(self, name: str) -> Iterable[Workspace]:
        workspace = Workspace(self._base, self._policies)
        for start, count in blocks_of(self._base.tensors[name].elements):
            workspace.load(name, start, count)
            yield workspace


def _norm(workspace: Workspace, step: TensorMerge) -> float:
    if not step.rows:
        return 0.0
    return exact_sum(float(np.abs(merged).sum()) for merged in pieces(workspace.merged_residual(step)))

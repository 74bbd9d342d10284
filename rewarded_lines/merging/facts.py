"""What a rule must know of whole tensors before their blocks can pass: angles, thresholds, a canonical order, norms.

Nothing here depends on λ, so several outputs share it. Sums are exact (`math.fsum`) or of integers: the numbers are
the same for any number of threads and any sharding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from threading import Lock
from typing import Any

import blake3
import numpy as np

from rewarded_lines.checkpoints.headers import TensorInfo
from rewarded_lines.checkpoints.reader import TensorFiles
from rewarded_lines.streaming import kernels
from rewarded_lines.streaming.blocks import Source, TensorMerge, Workspace, blocks_of
from rewarded_lines.streaming.pool import share_out

Gram = tuple[tuple[float, ...], ...]
# The 63 bits of a magnitude, from the top: exponent and five bits, then three times the rest.
_PASSES = ((47, 16), (31, 16), (15, 16), (0, 15))


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
                        parts[i][j].append(float(np.sum(residuals[i] * residuals[j])))
            self._grams[name] = tuple(tuple(math.fsum(part) for part in row) for row in parts)
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
            threads = 0 if scope == "model" else 1
            self._thresholds[key] = self._select(names, density, threads)
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
        return [(math.fsum(total for total, _ in pairs), math.fsum(joined for _, joined in pairs)) for pairs in outputs]

    def _norms(self, name: str, steps: Sequence[TensorMerge], order: list[int]) -> list[tuple[float, float]]:
        parts: list[list[tuple[float, float]]] = [[] for _ in steps]
        for workspace in self._passing(name):
            together = float(np.abs(workspace.residuals()[order].sum(axis=0)).sum())
            for step, sums in zip(steps, parts, strict=True):
                sums.append((together, _norm(workspace, step)))
        return [(math.fsum(a for a, _ in sums), math.fsum(b for _, b in sums)) for sums in parts]

    def _passing(self, name: str) -> Iterable[Workspace]:
        workspace = Workspace(self._base, self._policies)
        for start, count in blocks_of(self._base.tensors[name].elements):
            workspace.load(name, start, count)
            yield workspace

    def _select(self, names: Sequence[str], density: float, threads: int) -> tuple[float, ...]:
        """Find each policy's k-th largest magnitude by its bits, sixteen at a time from the top."""
        total = sum(self._base.tensors[name].elements for name in names)
        if total == 0 or density == 1:
            return (0.0,) * len(self._policies)
        ranks = [max(1, int(density * total))] * len(self._policies)
        prefixes = [0] * len(self._policies)
        for shift, bits in _PASSES:
            counts = self._count(names, prefixes, shift, bits, threads)
            for row, histogram in enumerate(counts):
                above = np.cumsum(histogram[::-1])
                place = int(np.searchsorted(above, ranks[row]))
                ranks[row] -= int(above[place - 1]) if place else 0
                prefixes[row] = (prefixes[row] << bits) | (len(histogram) - 1 - place)
        return tuple(float(value) for value in np.array(prefixes, np.uint64).view(np.float64))

    def _count(self, names: Sequence[str], prefixes: Sequence[int], shift: int, bits: int, threads: int) -> Any:
        """Return for each policy how many magnitudes that begin with its prefix have each value of the next bits."""
        counts = np.zeros((len(prefixes), 1 << bits), np.int64)
        lock = Lock()

        def worker() -> Callable[[tuple[str, int, int]], None]:
            workspace = Workspace(self._base, self._policies)
            mine = np.zeros_like(counts)

            def work(block: tuple[str, int, int]) -> None:
                workspace.load(*block)
                for row, residual in enumerate(workspace.residuals()):
                    mine[row] = 0
                    kernels.count_magnitudes(residual, prefixes[row], shift, bits, mine[row])
                with lock:
                    counts[...] += mine

            return work

        share_out(all_blocks(names, self._base.tensors), worker, threads)
        return counts


def _norm(workspace: Workspace, step: TensorMerge) -> float:
    return float(np.abs(workspace.merged_residual(step)).sum()) if step.rows else 0.0


def all_blocks(names: Iterable[str], tensors: Mapping[str, TensorInfo]) -> Iterable[tuple[str, int, int]]:
    """Yield name, start and length of every block of the tensors, in order."""
    for name in names:
        for start, count in blocks_of(tensors[name].elements):
            yield name, start, count

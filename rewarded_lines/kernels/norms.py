"""Numbers about whole tensors: norms, scalar products, thresholds and digests, measured block by block.

Sums over blocks are exact, so no number depends on threads or sharding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import blake3
import numpy as np

from rewarded_lines.checkpoints.dtypes import F64
from rewarded_lines.checkpoints.hashing import TensorDigests
from rewarded_lines.checkpoints.reader import TensorFiles
from rewarded_lines.kernels.blocks import BLOCK, PIECE, Source, Workspace, blocks_of, piece_sums, pieces
from rewarded_lines.kernels.kth_largest import kth_largest, share_of_nonzero
from rewarded_lines.kernels.measures import RUN, SUMMED, measure, note_squares
from rewarded_lines.kernels.rule_programs import Notes
from rewarded_lines.kernels.tensor_merge import Mask, TensorMerge
from rewarded_lines.kernels.thread_pool import share_out
from rewarded_lines.kernels.thresholds_and_masks import RandomMask, RankedMask, overlap_ratios

Gram = tuple[tuple[float, ...], ...]
Spread = Callable[[Sequence[Any]], Any]
_T = TypeVar("_T")


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
        self._found: dict[tuple[object, ...], object] = {}
        self._digests = TensorDigests()

    def digests(self, name: str) -> tuple[bytes, ...]:
        """Return the BLAKE3 digest of a tensor's values in each policy."""

        def measure() -> tuple[bytes, ...]:
            return tuple(self._digest(name, policy) for policy in self._policies)

        return self._once(("digests", name), measure)

    def gram(self, name: str) -> Gram:
        """Return the scalar products τ_i·τ_j of a whole tensor."""

        def measure() -> Gram:
            rows = range(len(self._policies))
            parts: list[list[list[float]]] = [[[] for _ in rows] for _ in rows]
            for workspace in self._passing(name):
                residuals = workspace.residuals()
                for i in rows:
                    for j in rows:
                        parts[i][j].append(float(np.einsum("n,n->", residuals[i], residuals[j])))
            return tuple(tuple(map(exact_sum, row)) for row in parts)

        return self._once(("gram", name), measure)

    def thresholds(self, name: str, rows: Sequence[int], density: float, scope: str) -> dict[str, list[float]]:
        """Return for some policies the k-th largest |τ_i|, k = max(1, ⌊density·n⌋), of the n values of a tensor.

        With the scope "model", n counts the values of all tensors. A rule keeps all values ≥ the threshold.
        """
        names = self._names if scope == "model" else [name]

        def measure() -> tuple[float, ...]:
            total = sum(self._base.tensors[each].elements for each in names)
            if total == 0 or density == 1:
                return (0.0,) * len(self._policies)
            # Several tensors are measured at the same time, so each in one thread.
            rank, threads = max(1, int(density * total)), int(scope == "tensor")
            return kth_largest(self._base, self._policies, names, [rank], threads)[0]

        found = self._once(("thresholds", "" if scope == "model" else name, density), measure)
        return {"thresholds": [found[row] for row in rows]}

    def bands(self, name: str, rows: Sequence[int], density: float, outliers: float) -> dict[str, list[float]]:
        """Return for some policies the smallest and the largest of the |τ_i| of a tensor that are kept.

        Of n values the ⌊outliers·n⌋ largest are dropped, and the next k = max(1, ⌊density·n⌋) are kept; so many must
        remain. Values as large as one of the two are kept, too.
        """
        count = self._base.tensors[name].elements
        kept = max(1, int(density * count))
        dropped = max(0, min(int(outliers * count), count - kept))

        def measure() -> tuple[tuple[float, ...], tuple[float, ...]]:
            lower, upper = (0.0,) * len(self._policies), (math.inf,) * len(self._policies)
            if count == 0 or density == 1:
                return lower, upper
            ranks = [dropped + kept, *([dropped + 1] if dropped else [])]
            found = kth_largest(self._base, self._policies, [name], ranks, threads=1)
            return found[0], found[1] if dropped else upper

        lower, upper = self._once(("bands", name, density, outliers), measure)
        return {"lower": [lower[row] for row in rows], "upper": [upper[row] for row in rows]}

    def boosts(
        self, name: str, rows: Sequence[int], changed: float, boost: float, cap: float, scope: str
    ) -> dict[str, list[float]]:
        """Return boost·min(q, cap) for some policies, q their `overlap_ratios` in a tensor or, by scope, the model."""
        names, chosen = (self._names if scope == "model" else [name]), tuple(sorted(rows))
        measure = partial(overlap_ratios, self._base, self._policies, names, chosen, changed, int(scope == "tensor"))
        found = self._once(("overlaps", "" if scope == "model" else name, chosen, changed), measure)
        return {"boosts": [boost * min(found[row], cap) for row in rows]}

    def selection(self, name: str, rows: Sequence[int], select: float, spread: Spread) -> dict[str, object]:
        """Return the smallest spread of a tensor's values that is selected, and each policy's share of the squares.

        Of the n values whose spread is not 0 the ⌊select·n⌋ with the largest are selected, and those equal to the last
        of them; all of a single policy. The shares are Σ τ_i² over the selected values, divided by their sum.

        Args:
            name: a tensor.
            rows: the policies, in the order of the sum.
            select: more than 0, at most 1, which selects all values.
            spread: the rule's measure of how far residuals differ.
        """

        def find() -> tuple[float, dict[int, float]]:
            least = 0.0
            if select < 1 and len(rows) > 1:
                step = TensorMerge(F64, None, tuple(rows), rule=lambda residuals, _: spread(residuals))
                least = share_of_nonzero(self._base, self._policies, [name], select, step)
            counter = _Squares(rows, least, spread)

            def note(notes: Notes, residuals: Sequence[Any]) -> None:
                note_squares(notes, [residuals[row] for row in rows], spread)

            measure(self._base, self._policies, [name], 1, lambda: counter, note, [least], PIECE)
            sums = [exact_sum(parts) for parts in counter.parts]
            total = exact_sum(sums) or 1.0
            return least, {row: one / total for row, one in zip(rows, sums, strict=True)}

        least, shares = self._once(("selection", name, tuple(sorted(rows)), select), find)
        return {"least": least, "squares": [shares[row] for row in rows]}

    def random_masks(self, name: str, rows: Sequence[int], density: float, seed: int) -> list[Mask]:
        """Return what draws each policy's mask of a block, true with probability `density`."""
        digests = self.digests(name)
        return [RandomMask(seed, name, digests[row], density) for row in rows]

    def ranked_masks(self, name: str, rows: Sequence[int], density: float, window: float, seed: int) -> list[Mask]:
        """Return what draws each policy's mask of a block, see `RankedMask`."""
        digests, shape = self.digests(name), self._base.tensors[name].shape
        # With all values kept there is nothing to rank.
        window, width = window if density < 1 else 0.0, shape[-1] if shape else 1
        return [RankedMask(seed, name, digests[row], density, window, width, row) for row in rows]

    def _digest(self, name: str, policy: Source) -> bytes:
        """Return the BLAKE3 digest of a policy's values, or of its residual where it stores none."""
        info = policy.tensors.get(name) if isinstance(policy, TensorFiles) else None
        if isinstance(policy, TensorFiles) and info and (known := self._digests.get(policy, info)):
            return known
        elements, digest, stored = self._base.tensors[name].elements, blake3.blake3(), name in policy.tensors
        dtype = policy.tensors[name].dtype.storage if stored else np.dtype(np.float64)
        values = np.empty(min(elements, BLOCK), dtype)
        for start, count in blocks_of(elements):
            fill = policy.read_into if stored else policy.residual_into  # type: ignore[union-attr]
            fill(name, start, values[:count])
            digest.update(values[:count].view(np.uint8).data)
        if info:
            self._digests.add(info, digest.digest())
        return digest.digest()

    def _once(self, key: tuple[object, ...], measure: Callable[[], _T]) -> _T:
        if key not in self._found:
            self._found[key] = measure()
        return self._found[key]  # type: ignore[return-value]

    def prepare(self, measure: Callable[[str], object]) -> None:
        """Measure every tensor, several at the same time, before the stream needs the numbers."""

        def work(name: str) -> None:
            measure(name)

        # The largest first, so that no thread is alone with one in the end.
        share_out(sorted(self._names, key=lambda name: -self._base.tensors[name].elements), lambda: work)
        self._digests.remember()

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

    def squares(self, merge: Callable[[str], TensorMerge]) -> dict[str, float]:
        """Return ‖m‖² of every tensor, m its merged residual without the schedule's scale."""
        found: dict[str, float] = {}

        def work(name: str) -> None:
            step = merge(name)
            merged = (workspace.merged_residuals([step])[0] for workspace in self._passing(name)) if step.rows else ()
            found[name] = exact_sum(total for values in merged for total in piece_sums(np.square(values)))

        share_out(self._names, lambda: work)
        return found

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


class _Squares:
    """Adds up τ² of some policies where a spread of all is at least a limit, piece by piece.

    Attributes:
        parts: of each policy the sums of pieces.
    """

    def __init__(self, rows: Sequence[int], least: float, spread: Spread) -> None:
        self.parts: list[list[float]] = [[] for _ in rows]
        self._sums = np.empty((len(rows), RUN // SUMMED))
        self.targets = list(self._sums)

        def squared(index: int, residuals: Sequence[Any], _: Sequence[float]) -> Any:
            selected = residuals[index] * (spread(residuals) >= least)
            return selected * selected

        self._steps = [TensorMerge(F64, None, tuple(rows), rule=partial(squared, index)) for index in range(len(rows))]

    def take(self, count: int) -> None:
        """See `Counter`; as numpy adds up a piece: sums of sums of two."""
        sums = self._sums[:, : count // SUMMED].reshape(len(self.parts), -1, PIECE // SUMMED)
        while sums.shape[-1] > 1:
            sums = sums[..., ::2] + sums[..., 1::2]
        for parts, found in zip(self.parts, sums[..., 0].tolist(), strict=True):
            parts += found

    def clear(self) -> None:
        """See `Counter`; each sum is written anew."""

    def look(self, workspace: Workspace) -> None:
        """See `Counter`."""
        for parts, step in zip(self.parts, self._steps, strict=True):
            parts += piece_sums(workspace.merged_residuals([step])[0])


def _norm(workspace: Workspace, step: TensorMerge) -> float:
    return exact_sum(piece_sums(np.abs(workspace.merged_residuals([step])[0]))) if step.rows else 0.0


def _summed(pairs: Iterable[tuple[float, float]]) -> tuple[float, float]:
    listed = list(pairs)
    return exact_sum(first for first, _ in listed), exact_sum(second for _, second in listed)

"""Blocks of tensors, and a thread's workspace: it reads blocks, merges them by a rule, rounds once.

A block is a fixed run of a tensor's values, counted from the tensor's start. So results do not depend on files, shards
or threads.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from rewarded_lines.checkpoints.dtypes import DType
from rewarded_lines.checkpoints.headers import TensorInfo
from rewarded_lines.checkpoints.reader import TensorFiles
from rewarded_lines.kernels import kernels
from rewarded_lines.kernels.rule_programs import Code, compiled_rules
from rewarded_lines.kernels.tensor_merge import Mask, TensorMerge, all_masks

# Values in a block: many enough that Python's share of the time is small, few enough to stay in cache.
BLOCK = 1 << 18
# Values that a rule gets at a time: its intermediate arrays stay in the innermost caches.
PIECE = 1 << 14
# Rules of so many tensors are kept.
_CODES = 16

Array = np.ndarray[Any, Any]


class Residuals(Protocol):
    """An adapter: it computes residuals for all tensors except those that it stores whole."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Return the tensors that are stored whole."""

    def read_into(self, name: str, start: int, values: Array) -> None:
        """Fill `values` from a tensor that is stored whole."""

    def touches(self, name: str) -> bool:
        """Return whether τ of a tensor may differ from zero."""

    def residual_into(self, name: str, start: int, out: Array) -> None:
        """Fill the float64 array `out` with τ of a tensor, from its `start`-th value on."""


Source = TensorFiles | Residuals


def blocks_of(elements: int) -> Iterator[tuple[int, int]]:
    """Yield start and length of every block of a tensor; a tensor without values has none."""
    for start in range(0, elements, BLOCK):
        yield start, min(BLOCK, elements - start)


def all_blocks(names: Iterable[str], tensors: Mapping[str, TensorInfo]) -> Iterator[tuple[str, int, int]]:
    """Yield name, start and length of every block of some tensors, in order."""
    for name in names:
        for start, count in blocks_of(tensors[name].elements):
            yield name, start, count


def pieces(values: Array) -> Iterator[Array]:
    """Yield a block's values in pieces that stay in cache; they are cut along the last axis."""
    for start in range(0, values.shape[-1], PIECE):
        yield values[..., start : start + PIECE]


def read_pair(base: TensorFiles, policy: Source, name: str, first: int, last: int) -> tuple[Array, Array]:
    """Return two arrays whose difference is τ of a policy, as `Workspace.pair` does, for a run of a tensor."""
    if name in policy.tensors:
        pair = [np.empty(last - first, source.tensors[name].dtype.storage) for source in (base, policy)]
        base.read_into(name, first, pair[0])
        policy.read_into(name, first, pair[1])
        return pair[0], pair[1]
    residual = np.empty(last - first)
    policy.residual_into(name, first, residual)  # type: ignore[union-attr]
    return np.zeros(last - first), residual


class Workspace:
    """One thread's buffers, and the block that is in them."""

    def __init__(self, base: TensorFiles, policies: Sequence[Source]) -> None:
        """Bind the inputs; the first block of each type allocates its buffers."""
        self._base = base
        self._policies = policies
        self._buffers: dict[tuple[str, Any], Array] = {}
        self._raw: list[Array | None] = []
        self._dtypes: list[DType | None] = []
        self._name, self._start = "", 0
        self._residuals: Array | None = None
        self._codes: dict[tuple[int, ...], tuple[Sequence[TensorMerge], Code | None]] = {}
        self._zeros = np.empty(0)
        self._drawn: dict[tuple[Mask, ...], Array] = {}

    def load(self, name: str, start: int, count: int) -> None:
        """Read one block of a tensor from every input that stores it."""
        self._name, self._start, self._residuals = name, start, None
        self._drawn.clear()
        self._raw, self._dtypes = [], []
        for row, source in enumerate([self._base, *self._policies]):
            raw, dtype = None, None
            if name in source.tensors:
                dtype = source.tensors[name].dtype
                raw = self._buffer("raw", dtype.storage, len(self._policies) + 1)[row, :count]
                source.read_into(name, start, raw)
            self._raw.append(raw)
            self._dtypes.append(dtype)

    def merge(self, steps: Sequence[TensorMerge]) -> list[tuple[Array, int]]:
        """Return each output's values of the loaded block, and how many of them are not finite.

        The arrays belong to this workspace: use them before the next call.
        """
        results: dict[int, tuple[Array, int]] = {}
        # By type and, if the linear kernel has them, by the policies that take part.
        together: dict[tuple[DType, tuple[int, ...]], list[int]] = {}
        for index, step in enumerate(steps):
            if step.copy is not None:
                results[index] = self._copied(step, step.copy, index)
            else:
                together.setdefault((step.dtype, step.rows if step.linear and self._alike() else ()), []).append(index)
        for (_, rows), indices in together.items():
            results |= (self._merge_linear if rows else self._merge_ruled)(steps, indices)
        return [results[index] for index in range(len(steps))]

    def _merge_ruled(self, steps: Sequence[TensorMerge], indices: Sequence[int]) -> dict[int, tuple[Array, int]]:
        """Merge by any rules, several outputs in one pass if the rules can be compiled."""
        chosen, base = [steps[index] for index in indices], self.values(0)
        out = self._buffer(f"out {indices}", chosen[0].dtype.storage, len(indices))
        counts = np.zeros(len(indices), np.int64)
        if code := self._compiled(chosen):
            self._run(code, chosen, out, counts)
        else:
            for k, step in enumerate(chosen):
                counts[k] = kernels.finish(base, self.merged_residuals([step])[0], step.scale, out[k, : base.size])
        return {index: (out[k, : base.size], int(counts[k])) for k, index in enumerate(indices)}

    def _run(self, code: Code, steps: Sequence[TensorMerge], out: Array, counts: Array, bare: bool = False) -> None:
        """Run the steps' machine code on the loaded block; if `bare`, `out` takes their residuals."""
        given = not self._alike()
        stack, start = (self.residuals(), 0) if given else self._stack()
        scales = np.array([1.0 if bare else step.scale for step in steps])
        kernels.merge_by_rules(
            self.values(0), stack, *code, self._masks(steps), scales, out, counts, start, given, bare
        )

    def _compiled(self, steps: Sequence[TensorMerge]) -> Code | None:
        """Return the machine code of the steps' rules after some work; it is kept for a tensor's other blocks."""
        if not kernels.is_long():
            return None
        key = tuple(map(id, steps))
        if key not in self._codes:
            if len(self._codes) == _CODES:
                self._codes.clear()
            # With the steps themselves, whose ids nothing else gets meanwhile.
            self._codes[key] = steps, compiled_rules(steps)
        return self._codes[key][1]

    def _masks(self, steps: Sequence[TensorMerge]) -> Array:
        """Return the masks of all steps for the loaded block, each once, [masks, n]; they are kept until the next."""
        draws, count = tuple(all_masks(steps)), self.values(0).size
        if draws not in self._drawn:
            dtype = draws[0].dtype if draws else np.dtype(np.bool_)
            masks = self._buffer(f"masks {len(self._drawn)} of {len(draws)}", dtype, len(draws))[:, :count]
            for draw, mask in zip(draws, masks, strict=True):
                draw(self.run, self._start, mask)
            self._drawn[draws] = masks
        return self._drawn[draws]

    def _merge_linear(self, steps: Sequence[TensorMerge], indices: Sequence[int]) -> dict[int, tuple[Array, int]]:
        """Merge by Σ λ_i·τ_i for several outputs in one pass, so that residuals are computed once."""
        first, base = steps[indices[0]], self.values(0)
        stack, start = self._stack()
        # Each group has its own buffers: all results stay valid until the next block.
        out = self._buffer(f"out {indices}", first.dtype.storage, len(indices))
        weights = np.array([np.array(steps[index].weights) * steps[index].scale for index in indices])
        counts = np.zeros(len(indices), np.int64)
        rows = np.array(first.rows)
        kernels.linear(base, stack, rows, weights, out, counts, start)
        if counts.any():
            kernels.restore(base, stack, rows, weights, out, start)
        return {index: (out[k, : base.size], int(counts[k])) for k, index in enumerate(indices)}

    def _stack(self) -> tuple[Array, int]:
        """Return the policies' values, [N, ≥ n], and where the loaded block begins in them."""
        return self._buffer("raw", self.values(0).dtype, len(self._policies) + 1)[1:], 0

    def _alike(self) -> bool:
        """Return whether all inputs store the loaded block, and in one type."""
        return all(
            raw is not None and dtype == self._dtypes[0] for raw, dtype in zip(self._raw, self._dtypes, strict=True)
        )

    def merged_residuals(self, steps: Sequence[TensorMerge]) -> Array:
        """Return the rules' residuals of the loaded block, [rules, n] float64, without the schedule's scale."""
        count = self.values(0).size
        out = self._buffer(f"merged {len(steps)}", np.dtype(np.float64), len(steps))[:, :count]
        if code := self._compiled(steps):
            self._run(code, steps, out, np.zeros(len(steps), np.int64), bare=True)
            return out
        residuals = self.residuals()
        for step, merged in zip(steps, out, strict=True):
            masks = step.kept(self._masks([step]))
            for start in range(0, count, PIECE):
                piece = slice(start, start + PIECE)
                rows = [residuals[row, piece] for row in step.rows]
                merged[piece] = step.residual(rows, [mask[piece] for mask in masks])
        return out

    def residuals(self) -> Array:
        """Return τ of every policy for the loaded block, float64, [N, n]."""
        if self._residuals is None:
            base = self.values(0)
            out = self._buffer("residual", np.dtype(np.float64), len(self._policies))[:, : base.size]
            for row, policy in enumerate(self._policies):
                if isinstance(policy, TensorFiles) or self._raw[row + 1] is not None:
                    kernels.residual(base, self.values(row + 1), out[row])
                else:
                    policy.residual_into(self._name, self._start, out[row])
            self._residuals = out
        return self._residuals

    def pair(self, row: int) -> tuple[Array, Array]:
        """Return two arrays of the loaded block whose difference is τ of a policy: stored values, or nothing and τ."""
        adapter = self._raw[row + 1] is None
        return (self.nothing(), self.residuals()[row]) if adapter else (self.values(0), self.values(row + 1))

    def nothing(self) -> Array:
        """Return as many zeros as the loaded block has values."""
        self._zeros = self._zeros if self._zeros.size else np.zeros(BLOCK)
        return self._zeros[: self.values(0).size]

    def run(self, row: int, first: int, last: int) -> tuple[Array, Array]:
        """Return the `pair` of a run of the loaded tensor, which may go beyond the loaded block."""
        if first == self._start and last - first == self.values(0).size:
            return self.pair(row)
        return read_pair(self._base, self._policies[row], self._name, first, last)

    def stored(self) -> Iterator[tuple[TensorInfo, int, Array]]:
        """Yield tensor, start and values of the loaded block, if there is one, for each file that has it."""
        for source, raw in zip([self._base, *self._policies], self._raw, strict=False):
            if raw is not None and isinstance(source, TensorFiles):
                yield source.tensors[self._name], self._start, raw

    def count_nonfinite(self, row: int) -> int:
        """Return how many values of the block are not finite in the base (0) or in policy `row` − 1."""
        raw = self._raw[row]
        return int(kernels.count_nonfinite(self.residuals()[row - 1] if raw is None else raw))

    def values(self, row: int) -> Array:
        """Return the loaded block as stored in the base (0) or in policy `row` − 1, which is no adapter."""
        raw = self._raw[row]
        assert raw is not None, "an adapter stores no tensors"
        return raw

    def _copied(self, step: TensorMerge, row: int, index: int) -> tuple[Array, int]:
        source, out = self.values(row), self._out(index, step.dtype)
        if source.dtype == out.dtype:
            return source, 0
        return out, int(kernels.cast(source, out))

    def _out(self, index: int, dtype: DType) -> Array:
        return self._buffer(f"out {index}", dtype.storage, 1)[0, : self.values(0).size]

    def _buffer(self, name: str, dtype: np.dtype[Any], rows: int) -> Array:
        """Return a [rows, BLOCK] array that all blocks share."""
        key = (name, dtype)
        if key not in self._buffers:
            self._buffers[key] = np.empty((rows, BLOCK), dtype)
        return self._buffers[key]


class MemoryWorkspace(Workspace):
    """A workspace over inputs in memory, which it does not copy: a block is a part of their arrays."""

    def __init__(self, base: TensorFiles, policies: Sequence[Source], held: Mapping[str, Sequence[Array]]) -> None:
        """Bind the inputs; `held` has the stored values of the base and of each policy, flat, by tensor.

        Where all have one type, they are the rows of one array, [1 + N, n]. Other tensors are read from the inputs.
        """
        super().__init__(base, policies)
        self._held = held

    def load(self, name: str, start: int, count: int) -> None:
        """See `Workspace.load`."""
        rows = self._held.get(name)
        if rows is None:
            super().load(name, start, count)
            return
        self._name, self._start, self._residuals = name, start, None
        self._drawn.clear()
        self._raw = [row[start : start + count] for row in rows]
        self._dtypes = [source.tensors[name].dtype for source in [self._base, *self._policies]]

    def _stack(self) -> tuple[Array, int]:
        rows = self._held.get(self._name)
        return (rows[1:], self._start) if isinstance(rows, np.ndarray) else super()._stack()

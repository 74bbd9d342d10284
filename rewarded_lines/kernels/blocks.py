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
from rewarded_lines.kernels import kernels, numpy_kernels
from rewarded_lines.kernels.rule_programs import Program, programs
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


def piece_sums(values: Array) -> list[float]:
    """Return the sum of each piece of a block's values, [n]."""
    whole = values.size // PIECE * PIECE
    sums: list[float] = values[:whole].reshape(-1, PIECE).sum(axis=1).tolist()
    return [*sums, float(values[whole:].sum())] if whole < values.size else sums


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
        self._codes: dict[tuple[int, ...], tuple[Sequence[TensorMerge], list[Program] | None]] = {}
        self._zeros = np.empty(0)
        self._drawn: dict[tuple[Mask, ...], Array] = {}
        self.finite = False

    def load(self, name: str, start: int, count: int) -> None:
        """Read one block of a tensor from every input that stores it."""
        self._begin(name, start)
        self._raw, self._dtypes = [], []
        for row, source in enumerate([self._base, *self._policies]):
            raw, dtype = None, None
            if name in source.tensors:
                dtype = source.tensors[name].dtype
                raw = self._buffer("raw", dtype.storage, len(self._policies) + 1)[row, :count]
                source.read_into(name, start, raw)
            self._raw.append(raw)
            self._dtypes.append(dtype)

    def _begin(self, name: str, start: int) -> None:
        self._name, self._start, self._residuals, self.finite = name, start, None, False
        self._drawn.clear()

    def merge(self, steps: Sequence[TensorMerge]) -> list[tuple[Array, int]]:
        """Return each output's values of the loaded block, and how many of them are not finite.

        The arrays belong to this workspace: use them before the next call.
        """
        outs = [self._out(index, step.dtype) for index, step in enumerate(steps)]
        if self._by_machine(steps, outs):
            self.finite = True
            return [(out, 0) for out in outs]
        kernels.expect(self.values(0).size * len(steps))
        return [self._by_numpy(step, out) for step, out in zip(steps, outs, strict=True)]

    def _by_numpy(self, step: TensorMerge, out: Array) -> tuple[Array, int]:
        if step.copy is not None:
            source = self.values(step.copy)
            return (source, 0) if source.dtype == out.dtype else (out, numpy_kernels.cast(source, out))
        base = self.values(0)
        with np.errstate(all="ignore"):
            if not (step.linear and self._alike()):
                return out, numpy_kernels.finish(base, self.merged_residuals([step])[0], step.scale, out)
            policies = [self.values(row + 1) for row in step.rows]
            return out, numpy_kernels.linear(base, policies, [weight * step.scale for weight in step.weights], out)

    def _by_machine(self, steps: Sequence[TensorMerge], outs: Sequence[Array], bare: bool = False) -> bool:
        """Merge by machine code; return False if the work is short, or a rule or a value too special for it.

        If `bare`, `outs` take the rules' residuals.
        """
        made = self._programs(steps, bare) if kernels.is_long() else None
        if made is None:
            return False
        ranked = made[0].ranked
        ranks = self._buffer(f"ranks of {len(ranked)}", np.dtype(np.uint32), len(ranked))[:, : self.values(0).size]
        for mask, row in zip(ranked, ranks, strict=True):
            mask.ranks(self.run, self._start, row)
        return all(
            program.loop.run(
                [*self.inputs(), *ranks], program.parameters, [outs[index] for index in program.outputs], self._start
            )
            for program in made
        )

    def _programs(self, steps: Sequence[TensorMerge], bare: bool) -> list[Program] | None:
        """Return the steps' machine code; it is kept for a tensor's other blocks."""
        key = (bare, *map(id, steps))
        if key not in self._codes:
            if len(self._codes) == _CODES:
                self._codes.clear()
            stored = [None if dtype is None else dtype.storage for dtype in self._dtypes]
            floating = all(dtype is None or dtype.floating for dtype in self._dtypes)
            # With the steps themselves, whose ids nothing else gets meanwhile.
            self._codes[key] = steps, programs(steps, stored, bare) if floating else None
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

    def _alike(self) -> bool:
        """Return whether all inputs store the loaded block, and in one type."""
        return all(
            raw is not None and dtype == self._dtypes[0] for raw, dtype in zip(self._raw, self._dtypes, strict=True)
        )

    def merged_residuals(self, steps: Sequence[TensorMerge]) -> Array:
        """Return the rules' residuals of the loaded block, [rules, n] float64, without the schedule's scale."""
        count = self.values(0).size
        out = self._buffer(f"merged {len(steps)}", np.dtype(np.float64), len(steps))[:, :count]
        if self._by_machine(steps, list(out), bare=True):
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

    def inputs(self) -> list[Array]:
        """Return what the base and each policy have of the loaded block: stored values, or τ."""
        return [self.residuals()[row - 1] if raw is None else raw for row, raw in enumerate(self._raw)]

    def pairs(self) -> list[tuple[Array, Array]]:
        """Return the `pair` of every policy."""
        return [self.pair(row) for row in range(len(self._policies))]

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
        self._begin(name, start)
        self._raw = [row[start : start + count] for row in rows]
        self._dtypes = [source.tensors[name].dtype for source in [self._base, *self._policies]]

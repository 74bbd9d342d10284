"""An adapter as a source of residuals, block by block, in float64."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from itertools import accumulate
from threading import Lock
from typing import Any

import numpy as np

from rewarded_lines.checkpoints.adapters import Adapter, BareBase
from rewarded_lines.checkpoints.dtypes import widest
from rewarded_lines.checkpoints.headers import TensorInfo
from rewarded_lines.checkpoints.low_rank import LowRank, TokenRows
from rewarded_lines.checkpoints.reader import Checkpoint
from rewarded_lines.kernels import kernels

Array = np.ndarray[Any, Any]

Base = Checkpoint | BareBase

# The number of modules whose float64 factors are cached: threads work on neighbouring blocks, so on few modules.
_KEPT = 3
# The layers of these families store [in, out] (transformers' Conv1D), and PEFT adds the transpose of B·A to them.
_CONV1D_FAMILIES = ("gpt2", "imagegpt", "decision_transformer", "openai-gpt")
_CONV1D_LAYERS = ("c_attn", "q_attn", "c_proj", "c_fc")
# Fused experts of these families are stored as [experts, in, out], those of others as [experts, out, in].
_TRANSPOSED_EXPERTS = ("gpt_oss", "openai_privacy_filter", "aria", "aria_text")


def is_transposed(module: LowRank, base: Base) -> bool:
    """True if the base stores the matrix of an adapter's module as [in, out], or each expert's."""
    family = base.config.get("model_type")
    if not module.experts:
        last = module.module.rpartition(".")[2]
        return not module.embedding and family in _CONV1D_FAMILIES and last in _CONV1D_LAYERS
    out, columns = module.shape[-2:]
    if out == columns:
        return family in _TRANSPOSED_EXPERTS
    stored = base.tensors.get(module.tensor)
    return stored is not None and stored.shape[-2:] == (columns, out)


def stored_shape(module: LowRank, base: Base) -> tuple[int, ...]:
    """Return the shape of a module's matrix in a checkpoint."""
    *experts, out, columns = module.shape
    return (*experts, columns, out) if is_transposed(module, base) else module.shape


def stored_parts(module: LowRank, base: Base) -> dict[str, int]:
    """Return the base's tensors that hold an adapter's matrix, with the first value of each in it; {} without them.

    A matrix has one tensor. The fused experts of a mixture may have one or several for each expert.
    """
    if module.tensor in base.tensors:
        return {module.tensor: 0}
    # One more than parts: the last is the end of all.
    starts = accumulate((base.tensors[name].elements for name in module.parts), initial=0)
    return dict(zip(module.parts, starts, strict=False))


class FoldedAdapter:
    """One adapter over one base: τ = scaling·B·A, or saved − base if the adapter stores the tensor whole.

    An embedding of which the adapter replaces some rows counts as stored whole: its other rows are the base's.
    """

    def __init__(self, adapter: Adapter, base: Base) -> None:
        """Bind an adapter that fits the base; no tensor is read yet."""
        self._adapter, self._base = adapter, base
        self._parts = {
            name: (module, start)
            for module in adapter.modules.values()
            for name, start in stored_parts(module, base).items()
        }
        self._transposed = {
            name: module.embedding or is_transposed(module, base) for name, module in adapter.modules.items()
        }
        self._rows = {name: self._placed(rows, name) for name, rows in adapter.rows.items() if name in base.tensors}
        self._factors: OrderedDict[str, tuple[Array, Array]] = OrderedDict()
        self._lock = Lock()

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Return the tensors that the adapter stores whole."""
        return self._adapter.saved | {name: info for name, (info, _) in self._rows.items()}

    def read_into(self, name: str, start: int, values: Array) -> None:
        """Fill `values` from a tensor that the adapter stores whole."""
        if name not in self._rows:
            self._adapter.read_into(self._adapter.saved[name].name, start, values)
            return
        kernels.cast(self._base.read(name, start, values.size), values)
        info, places = self._rows[name]
        width, source = info.shape[1], self._adapter.rows[name].info.name
        for place in range(start // width, (start + values.size - 1) // width + 1):
            if place in places:
                first, last = max(start, place * width), min(start + values.size, (place + 1) * width)
                row = self._adapter.read(source, (places[place] - place) * width + first, last - first)
                kernels.cast(row, values[first - start : last - start])

    def touches(self, name: str) -> bool:
        """True if the adapter changes a tensor."""
        return name in self._parts or name in self._adapter.saved or name in self._rows

    def residual_into(self, name: str, start: int, out: Array) -> None:
        """Fill `out` with scaling·B·A from the `start`-th value on; zeros if the adapter has no such module."""
        if name not in self._parts:
            out[:] = 0.0
            return
        module, first = self._parts[name]
        left, right = self._widened(module)
        size, done = left.shape[1] * right.shape[2], 0
        while done < out.size:
            expert, inside = divmod(first + start + done, size)
            count = min(size - inside, out.size - done)
            kernels.product(left[expert], right[expert], module.scaling, inside, out[done : done + count])
            done += count

    def _placed(self, rows: TokenRows, name: str) -> tuple[TensorInfo, dict[int, int]]:
        """Return the embedding with an adapter's rows in it, and for each replaced row its place among them."""
        base = self._base
        places = base.places(name) if isinstance(base, SelectedRows) else {}
        info = replace(base.tensors[name], dtype=widest([base.tensors[name].dtype, rows.info.dtype]))
        return info, {places.get(token, token): index for index, token in enumerate(rows.tokens)}

    def _widened(self, module: LowRank) -> tuple[Array, Array]:
        """Return B and A as float64, or Aᵀ and Bᵀ for a matrix stored as [in, out]; the last few are cached.

        Each has one matrix per expert, or only one.
        """
        with self._lock:
            if module.module not in self._factors:
                experts = max(1, module.experts)
                a = self._wide(module.a).reshape(experts, module.rank, -1)
                b = self._wide(module.b).reshape(-1, module.rank, experts).transpose(2, 0, 1)
                transposed = self._transposed[module.module]
                left, right = (a.transpose(0, 2, 1), b.transpose(0, 2, 1)) if transposed else (b, a)
                self._factors[module.module] = np.ascontiguousarray(left), np.ascontiguousarray(right)
            self._factors.move_to_end(module.module)
            while len(self._factors) > _KEPT:
                self._factors.popitem(last=False)
            return self._factors[module.module]

    def _wide(self, info: TensorInfo) -> Array:
        wide = np.empty(info.elements, np.float64)
        kernels.cast(self._adapter.read(info.name), wide)
        return wide


class ZeroBase(BareBase):
    """A base with zeros for tensors that it lacks, for measures of residuals that do not depend on the base."""

    def __init__(self, base: Checkpoint | BareBase, tensors: Mapping[str, TensorInfo]) -> None:
        """Bind the base, and name, type and shape of all tensors."""
        super().__init__(base.folder, base.config)
        self._base = base
        self.tensors = {**tensors, **base.tensors}

    def read_into(self, name: str, start: int, values: Array) -> None:
        """Fill `values` from the base, or with zeros."""
        if name in self._base.tensors:
            self._base.read_into(name, start, values)
        else:
            values[:] = 0


class SelectedRows(BareBase):
    """A base with only some rows of its embeddings, for adapters that replace these (`trainable_token_indices`)."""

    def __init__(self, base: Base, rows: Mapping[str, tuple[int, ...]]) -> None:
        """Bind the base, and the tokens whose rows are kept, by tensor."""
        super().__init__(base.folder, base.config)
        self._base, self._rows = base, rows
        shapes = {name: (len(tokens), base.tensors[name].shape[1]) for name, tokens in rows.items()}
        self.tensors = {**base.tensors, **{name: replace(base.tensors[name], shape=shapes[name]) for name in rows}}

    def places(self, name: str) -> dict[int, int]:
        """Return for each token the row that it has here."""
        return {token: place for place, token in enumerate(self._rows[name])}

    def read_into(self, name: str, start: int, values: Array) -> None:
        """Fill `values` from the rows that are kept, or from another tensor of the base."""
        if name not in self._rows:
            self._base.read_into(name, start, values)
            return
        width, done = self.tensors[name].shape[1], 0
        while done < values.size:
            place, inside = divmod(start + done, width)
            count = min(width - inside, values.size - done)
            self._base.read_into(name, self._rows[name][place] * width + inside, values[done : done + count])
            done += count

"""An adapter as a source of residuals, block by block, in float64."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from threading import Lock
from typing import Any

import numpy as np

from rewarded_lines.checkpoints.adapters import Adapter, BareBase, LowRank
from rewarded_lines.checkpoints.headers import TensorInfo
from rewarded_lines.checkpoints.reader import Checkpoint
from rewarded_lines.kernels import kernels

Array = np.ndarray[Any, Any]

# The number of modules whose float64 factors are cached: threads work on neighbouring blocks, so on few modules.
_KEPT = 3
# The layers of these families store [in, out] (transformers' Conv1D), and PEFT adds the transpose of B·A to them.
_CONV1D_FAMILIES = ("gpt2", "imagegpt", "decision_transformer", "openai-gpt")
_CONV1D_LAYERS = ("c_attn", "q_attn", "c_proj", "c_fc")


def is_transposed(module: LowRank, config: Mapping[str, Any]) -> bool:
    """True if a model with this config.json stores the matrix of an adapter's module as [in, out]."""
    last = module.module.rpartition(".")[2]
    return not module.embedding and config.get("model_type") in _CONV1D_FAMILIES and last in _CONV1D_LAYERS


def stored_shape(module: LowRank, config: Mapping[str, Any]) -> tuple[int, int]:
    """Return the shape of a module's matrix in a checkpoint."""
    return module.shape[::-1] if is_transposed(module, config) else module.shape


class FoldedAdapter:
    """One adapter over one base: τ = scaling·B·A, or saved − base if the adapter stores the tensor whole."""

    def __init__(self, adapter: Adapter, config: Mapping[str, Any]) -> None:
        """Bind an adapter that fits the base with this config.json; no tensor is read yet."""
        self._adapter = adapter
        self._modules = {module.tensor: module for module in adapter.modules.values()}
        self._transposed = {
            name: module.embedding or is_transposed(module, config) for name, module in self._modules.items()
        }
        self._factors: OrderedDict[str, tuple[Array, Array]] = OrderedDict()
        self._lock = Lock()

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Return the tensors that the adapter stores whole."""
        return self._adapter.saved

    def read_into(self, name: str, start: int, values: Array) -> None:
        """Fill `values` from a tensor that the adapter stores whole."""
        self._adapter.read_into(self._adapter.saved[name].name, start, values)

    def touches(self, name: str) -> bool:
        """True if the adapter changes a tensor."""
        return name in self._modules or name in self._adapter.saved

    def residual_into(self, name: str, start: int, out: Array) -> None:
        """Fill `out` with scaling·B·A from the `start`-th value on; zeros if the adapter has no such module."""
        module = self._modules.get(name)
        if module is None:
            out[:] = 0.0
            return
        left, right = self._widened(module)
        kernels.product(left, right, module.scaling, start, out)

    def _widened(self, module: LowRank) -> tuple[Array, Array]:
        """Return B and A as float64, or Aᵀ and Bᵀ for a matrix stored as [in, out]; the last few are cached."""
        with self._lock:
            if module.module not in self._factors:
                a, b = self._wide(module.a), self._wide(module.b)
                left, right = (a.T, b.T) if self._transposed[module.tensor] else (b, a)
                self._factors[module.module] = np.ascontiguousarray(left), np.ascontiguousarray(right)
            self._factors.move_to_end(module.module)
            while len(self._factors) > _KEPT:
                self._factors.popitem(last=False)
            return self._factors[module.module]

    def _wide(self, info: TensorInfo) -> Array:
        wide = np.empty(info.elements, np.float64)
        kernels.cast(self._adapter.read(info.name), wide)
        return wide.reshape(info.shape)


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

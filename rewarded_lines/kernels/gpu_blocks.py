"""The same workspace on a GPU: pinned buffers, a stream for each thread, results equal within one rounding.

Two threads with a stream each are a double buffer: one block is copied or computed while the other is read or written.
torch computes in float64. Its cast to 16 bits goes through float32, so the rounding can differ from the CPU's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from rewarded_lines.checkpoints.dtypes import as_torch
from rewarded_lines.checkpoints.reader import TensorFiles
from rewarded_lines.kernels.blocks import BLOCK, Array, Source, TensorMerge, Workspace


class DeviceWorkspace(Workspace):
    """A workspace whose rules run on a device of torch."""

    def __init__(self, base: TensorFiles, policies: Sequence[Source], device: str) -> None:
        """Make a stream on a device of torch, e.g. "cuda:1"."""
        super().__init__(base, policies)
        self._device = torch.device(device)
        self._pinned = self._device.type == "cuda"
        self._stream: Any = torch.cuda.Stream(self._device) if self._pinned else None  # type: ignore[no-untyped-call]

    def merge(self, steps: Sequence[TensorMerge]) -> list[tuple[Array, int]]:
        """See `Workspace.merge`."""
        return [self._merge_one(step, index) for index, step in enumerate(steps)]

    def _merge_one(self, step: TensorMerge, index: int) -> tuple[Array, int]:
        if step.copy is not None:
            return super()._merge_one(step, index)
        with torch.cuda.stream(self._stream):
            base = self._wide(0)
            residuals = [self._residual(row, base) for row in step.rows]
            start, count = self._start, base.numel()
            drawn = {"kept": [self._moved(mask) for mask in step.masks(start, count)]} if step.masks else {}
            assert step.rule is not None, "a copied tensor has no residual"
            merged = base + step.scale * step.rule(residuals, step.weights, **step.parameters, **drawn)
            values = merged.to(getattr(torch, step.dtype.torch))
            bad = (~torch.isfinite(values)).sum()
            out = self._buffer(f"out {index}", step.dtype.storage, 1)[0, :count]
            as_torch(out, step.dtype).copy_(values, non_blocking=True)
        if self._stream:
            self._stream.synchronize()
        return out, int(bad)

    def _wide(self, row: int) -> torch.Tensor:
        """Return the stored block of an input on the device, as float64."""
        dtype = self._dtypes[row]
        assert dtype is not None, "an adapter stores no tensors"
        return self._moved(as_torch(self._stored(row), dtype)).to(torch.float64)

    def _residual(self, row: int, base: torch.Tensor) -> torch.Tensor:
        if self.raw(row + 1) is None:
            return self._moved(self.residuals()[row])
        policy = self._wide(row + 1)
        # The difference of equal infinities would be NaN.
        return torch.where(policy == base, 0.0, policy - base)

    def _moved(self, values: Any) -> torch.Tensor:
        tensor = torch.from_numpy(values) if isinstance(values, np.ndarray) else values
        moved: torch.Tensor = tensor.to(self._device, non_blocking=True)
        return moved

    def _buffer(self, name: str, dtype: np.dtype[Any], rows: int) -> Array:
        key = (name, dtype)
        if key not in self._buffers:
            memory = torch.empty(rows * BLOCK * dtype.itemsize, dtype=torch.uint8, pin_memory=self._pinned)
            self._buffers[key] = memory.numpy().view(dtype).reshape(rows, BLOCK)
        return self._buffers[key]

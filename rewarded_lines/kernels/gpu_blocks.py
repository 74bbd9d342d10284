"""The same workspace on a GPU: pinned buffers, a stream for each thread, the CPU's bits.

Threads with a stream each are a chain of buffers: one block is copied or computed while others are read or written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from rewarded_lines.checkpoints.dtypes import as_torch
from rewarded_lines.checkpoints.reader import TensorFiles
from rewarded_lines.kernels.blocks import BLOCK, Array, Source, Workspace
from rewarded_lines.kernels.tensor_merge import TensorMerge
from rewarded_lines.kernels.torch_kernels import merge_values


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
        return [self._merge_one(index, step) for index, step in enumerate(steps)]

    def load(self, name: str, start: int, count: int) -> None:
        """See `Workspace.load`; a block's inputs are copied once, for all outputs."""
        super().load(name, start, count)
        self._there: list[torch.Tensor | None] = []

    def _merge_one(self, index: int, step: TensorMerge) -> tuple[Array, int]:
        if step.copy is not None:
            return self._by_numpy(step, self._out(index, step.dtype))
        with torch.cuda.stream(self._stream):
            base, *policies = self._inputs()
            assert base is not None, "a base stores its tensors"
            kept = [self._moved(torch.from_numpy(mask)) for mask in step.kept(self._masks([step]))]
            values, bad = merge_values(step, base, policies, self._alike(), self._residual, kept)
            out = self._out(index, step.dtype)
            as_torch(out, step.dtype).copy_(values, non_blocking=True)
        if self._stream:
            self._stream.synchronize()
        return out, bad

    def _inputs(self) -> list[torch.Tensor | None]:
        """Return the stored block of every input on the device, None for an adapter."""
        if not self._there:
            self._there = [
                None if raw is None or dtype is None else self._moved(as_torch(raw, dtype))
                for raw, dtype in zip(self._raw, self._dtypes, strict=True)
            ]
        return self._there

    def _residual(self, row: int) -> torch.Tensor:
        return self._moved(torch.from_numpy(self.residuals()[row]))

    def _moved(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self._device, non_blocking=True)

    def _buffer(self, name: str, dtype: np.dtype[Any], rows: int) -> Array:
        key = (name, dtype)
        if key not in self._buffers:
            memory = torch.empty(rows * BLOCK * dtype.itemsize, dtype=torch.uint8, pin_memory=self._pinned)
            self._buffers[key] = memory.numpy().view(dtype).reshape(rows, BLOCK)
        return self._buffers[key]

"""Base and policies kept in memory between merges: on the GPU, in the host's memory, or read from disk each time.

Every level makes the same bits as `merge` writes. Where memory runs out, the inputs move one level down.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from rewarded_lines.checkpoints.dtypes import as_torch
from rewarded_lines.engines.memory_levels import CHUNK, LEVELS, Level
from rewarded_lines.engines.pinned_memory import PinnedMemory
from rewarded_lines.engines.worker_shares import FULL, WELL, Share
from rewarded_lines.kernels import kernels
from rewarded_lines.kernels.blocks import Array, MemoryWorkspace, Workspace, blocks_of, read_pair
from rewarded_lines.kernels.tensor_merge import TensorMerge
from rewarded_lines.kernels.thread_pool import share_out
from rewarded_lines.kernels.torch_kernels import cast, count_nonfinite, merge_values
from rewarded_lines.merger.model_plan import ModelPlan
from rewarded_lines.merger.spec import MergeSpec
from rewarded_lines.out_of_memory import empty_cache

_FULL = (torch.OutOfMemoryError, MemoryError)
_ELSEWHERE = "no room at another worker"

Rows = list[torch.Tensor]
"""A tensor's stored values, flat, in the base and in each policy."""


class Resident:
    """The inputs of a plan in memory, and merges made from there, tensor by tensor.

    For a GPU, the inputs wait there or in pinned memory, and the merge is computed there. For a CPU, the compiled loops
    read the inputs in place. Policies are whole models. Not for several threads at a time.

    Attributes:
        level: where the inputs are.
    """

    def __init__(
        self, plan: ModelPlan, level: Level, device: str | torch.device = "cpu", share: Share | None = None
    ) -> None:
        """Bind the inputs; `load` or the first merge loads them.

        Args:
            plan: what merges are made of.
            level: where the inputs shall be.
            device: where the merged tensors are needed.
            share: this worker's part of every tensor, if several merge together on GPUs.
        """
        self.level: Level = level
        self._plan, self._device, self._share = plan, torch.device(device), share or Share()
        self._infos = {info.name: info for info in plan.outputs()}
        self._arrays: dict[str, Sequence[Array]] = {}
        self._rows: dict[str, Rows] = {}
        self._bad: dict[str, list[int]] = {}
        self._pinned: PinnedMemory | None = None

    @property
    def _on_device(self) -> bool:
        """Whether torch merges, on its device; otherwise the compiled loops do."""
        return self.level == "gpu" or (self.level == "host" and self._device.type != "cpu")

    def load(self) -> None:
        """Load the inputs now, before others take the memory that is meant for them."""
        if self.level != "disk":
            count = len(self._plan.policies)
            # A merge that copies no tensor.
            self.tensors(MergeSpec((0.5 / count,) * count, 1.0, 0.0))

    def tensors(self, spec: MergeSpec) -> Iterator[tuple[str, torch.Tensor]]:
        """Load the inputs, then yield every merged tensor, on the device or from a CPU; refuse what is not finite.

        The call itself loads, so that an engine is still whole if that fails.
        """
        self._plan.prepare([spec])
        self._load(spec)
        if not self._on_device:
            return self._plan.tensors(spec, (), self._workspace())
        return ((name, self._merged(name, spec)) for name in self._plan.names)

    def close(self) -> None:
        """Free the memory."""
        self._arrays, self._rows, self._bad = {}, {}, {}
        if self._pinned:
            self._pinned.close()
            self._pinned = None
        empty_cache()

    def _merged(self, name: str, spec: MergeSpec) -> torch.Tensor:
        while self._on_device:
            reason = ""
            try:
                part, bad, whole = self._part_there(name, spec)
            except _FULL as error:
                # Told outside this block: the error would keep what was computed.
                reason = str(error) or "no memory"
            if self._share.agree(FULL if reason else WELL) == WELL:
                return self._joined(name, spec, self._share.joined(part, whole, self._infos[name].elements), bad)
            self._move_down(reason or _ELSEWHERE)
            self._load(spec)
        ((_, tensor),) = self._plan.tensors(spec, [name], self._workspace())
        return tensor

    # ---- loading ----------------------------------------------------------------------------------------------------

    def _load(self, spec: MergeSpec) -> None:
        """Load the inputs if they are not there; move down until they fit, all workers to the same level."""
        while self.level != "disk" and not (self._rows or self._arrays):
            reason = ""
            try:
                self._read()
                self._try_largest(spec)
            except _FULL as error:
                reason = str(error) or "no memory"
            if self._share.agree(FULL if reason else WELL) == FULL:
                self._move_down(reason or _ELSEWHERE)
            elif self._on_device:
                self._bad = self._all_bad()

    def _read(self) -> None:
        kept: dict[str, Any] = {}
        if self._on_device and self.level == "host":
            self._pinned = PinnedMemory(self._device)

        def work(name: str) -> None:
            arrays = self._stored(name)
            if not self._on_device:
                kept[name] = arrays
                return
            floating = self._infos[name].dtype.floating
            self._bad[name] = [kernels.count_nonfinite(array) if floating else 0 for array in arrays]
            kept[name] = self._moved(name, arrays)

        share_out(self._plan.names, lambda: work)
        self._arrays, self._rows = ({}, kept) if self._on_device else (kept, {})

    def _stored(self, name: str) -> Sequence[Array]:
        """Read a worker's part of a tensor from every input; of one that is not merged, from the base."""
        info = self._infos[name]
        start, count = self._share.part(info.elements)
        sources = self._sources(name)
        kinds = [source.tensors[name].dtype.storage for source in sources]
        empty = self._pinned.empty if self._pinned else partial(np.empty, dtype=np.uint8)
        # Inputs of one type are rows of one array, as the compiled loops need them.
        arrays: Sequence[Array]
        if len(set(kinds)) == 1:
            arrays = empty(len(kinds) * count * kinds[0].itemsize).view(kinds[0]).reshape(len(kinds), count)
        else:
            arrays = [empty(count * kind.itemsize).view(kind) for kind in kinds]
        for source, values in zip(sources, arrays, strict=True):
            source.read_into(name, start, values)
        return arrays

    def _sources(self, name: str) -> Sequence[Any]:
        return self._plan.sources if self._infos[name].dtype.floating else self._plan.sources[:1]

    def _moved(self, name: str, arrays: Sequence[Array]) -> Rows:
        kinds = [source.tensors[name].dtype for source in self._sources(name)]
        rows = [as_torch(array, kind) for array, kind in zip(arrays, kinds, strict=True)]
        return rows if self._pinned else [row.to(self._device) for row in rows]

    def _try_largest(self, spec: MergeSpec) -> None:
        """Merge the largest tensor, so that memory runs out now rather than in the midst of a swap."""
        name = max(self._infos.values(), key=lambda info: info.elements).name
        step = self._plan.step(name, spec)
        if self._on_device and step.copy is None:
            self._computed(name, step, self._there(name))

    def _all_bad(self) -> dict[str, list[int]]:
        """Return for every tensor how many values are not finite in each input, of all workers' parts."""
        counts = {name: self._bad[name] for name in self._plan.names}
        together = iter(self._share.summed([count for row in counts.values() for count in row], self._device))
        return {name: [next(together) for _ in row] for name, row in counts.items()}

    def _move_down(self, reason: str) -> None:
        before, self.level = self.level, LEVELS[LEVELS.index(self.level) + 1]
        self.close()
        why = (reason.splitlines() or ["no memory"])[0][:120]
        logging.getLogger(__name__).warning(f"resident: {before} had no room ({why}); now {self.level}")

    # ---- merging ----------------------------------------------------------------------------------------------------

    def _workspace(self) -> Callable[[], Workspace] | None:
        """Return what makes a thread's workspace over the arrays; None to read from disk."""
        base, *policies = self._plan.sources
        # A tensor that is not merged has one array.
        held = {name: arrays for name, arrays in self._arrays.items() if len(arrays) == 1 + len(policies)}
        return partial(MemoryWorkspace, base, policies, held) if held else None  # type: ignore[arg-type]

    def _part_there(self, name: str, spec: MergeSpec) -> tuple[torch.Tensor, int, torch.Tensor]:
        """Return a worker's part of a merged tensor, how many values are not finite, and room for the whole tensor."""
        step, rows = self._plan.step(name, spec), self._there(name)
        if step.copy is None:
            part, bad = self._computed(name, step, rows)
        else:
            source, kind = rows[step.copy], getattr(torch, step.dtype.torch)
            # A clone: whoever gets the tensor may change it.
            part, bad = (source.clone(), 0) if source.dtype == kind else cast(source, kind)
        mine, whole = self._share.room(part, self._infos[name].elements)
        return mine, bad, whole

    def _joined(self, name: str, spec: MergeSpec, whole: torch.Tensor, bad: int) -> torch.Tensor:
        """Return a whole merged tensor in its shape; refuse values that are not finite."""
        info, step = self._infos[name], self._plan.step(name, spec)
        if self._share.size > 1 and info.dtype.floating:
            bad = count_nonfinite(whole)
        nonfinite = self._plan.nonfinite()
        nonfinite.look(_Counted(self._bad[name]), name, [step], [bad])
        nonfinite.refuse()
        return whole.view(info.shape)

    def _computed(self, name: str, step: TensorMerge, rows: Rows) -> tuple[torch.Tensor, int]:
        """Merge a worker's part of a tensor, so many values at a time that the device has room for them."""
        base, *policies = rows
        out = torch.empty(base.numel(), dtype=getattr(torch, step.dtype.torch), device=self._device)
        alike = len({row.dtype for row in rows}) == 1
        first, bad = self._share.part(self._infos[name].elements)[0], 0
        for start in range(0, base.numel(), CHUNK):
            piece = slice(start, min(start + CHUNK, base.numel()))
            kept = self._masks(name, step, first + start, piece.stop - start)
            out[piece], more = merge_values(step, base[piece], [row[piece] for row in policies], alike, kept=kept)
            bad += more
        return out, bad

    def _masks(self, name: str, step: TensorMerge, start: int, count: int) -> list[torch.Tensor]:
        """Draw masks block by block, as their random numbers are counted."""
        base, *policies = self._plan.sources
        masks = [np.empty(count, draw.dtype) for draw in step.masks]

        def run(row: int, first: int, last: int) -> tuple[Array, Array]:
            return read_pair(base, policies[row], name, first, last)  # type: ignore[arg-type]

        def work(block: tuple[int, int]) -> None:
            for draw, mask in zip(step.masks, masks, strict=True):
                draw(run, start + block[0], mask[block[0] : sum(block)])

        share_out(blocks_of(count) if masks else (), lambda: work)
        return [torch.from_numpy(mask).to(self._device) for mask in masks]

    def _there(self, name: str) -> Rows:
        """Return a tensor's inputs on the device; from pinned memory, the next tensor's are copied meanwhile."""
        if self._pinned is None:
            return self._rows[name]
        order = self._plan.names
        following = order[(order.index(name) + 1) % len(order)]
        return self._pinned.there(name, self._rows[name], following, self._rows[following])


class _Counted:
    """The counts of a whole tensor, made when it was loaded."""

    finite = False

    def __init__(self, counts: Sequence[int]) -> None:
        self._counts = counts

    def count_nonfinite(self, row: int) -> int:
        return self._counts[row]

"""Merged adapters on disk: stacked factors in one file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from rewarded_lines.checkpoints.adapters import PREFIX, TOKEN_ROWS, Adapter
from rewarded_lines.checkpoints.dtypes import DType
from rewarded_lines.checkpoints.headers import TensorInfo
from rewarded_lines.checkpoints.low_rank import LowRank
from rewarded_lines.checkpoints.reader import total_bytes
from rewarded_lines.checkpoints.writer import CheckpointWriter
from rewarded_lines.kernels import kernels
from rewarded_lines.kernels.blocks import BLOCK, Array, Workspace, blocks_of
from rewarded_lines.kernels.tensor_merge import TensorMerge
from rewarded_lines.kernels.thread_pool import share_out
from rewarded_lines.merger.model_plan import ModelPlan
from rewarded_lines.progress import Progress

Item = Callable[[Workspace], None]


@dataclass(frozen=True)
class Part:
    """One policy's part of a stacked module: B times `factor`, from row `first` of A and column `first` of B on.

    The fused experts of a mixture have such parts each; see `LowRank`.
    """

    policy: int
    factor: float
    first: int


@dataclass(frozen=True)
class Stack:
    """A module of the merged adapter, of rank Σr; zero without parts.

    Attributes:
        like: a policy's module of the same kind.
        rank: Σr.
        parts: the policies' parts.
        path: the module's name in the file; see `paths_of`.
    """

    like: LowRank
    rank: int
    parts: tuple[Part, ...]
    path: str = ""

    @property
    def experts(self) -> int:
        """Return how many matrices the module has."""
        return max(1, self.like.experts)

    @property
    def width(self) -> int:
        """Return the rows of A and the columns of B."""
        return self.rank * self.experts

    def key(self, factor: str) -> str:
        """Return the name of A or B in the file."""
        kind = f"lora_embedding_{factor}" if self.like.embedding else f"lora_{factor}.weight"
        return f"{PREFIX}{self.path}.{kind}"


@dataclass(frozen=True)
class AdapterOutput:
    """One merged adapter.

    Attributes:
        dtype: of A and B.
        stacks: by module.
        whole: the merges of tensors that replace the base's, by the base's name.
        copied: the policy that is repeated with its settings; None if the output is computed.
        own_names: the model's names for tensors that the base names otherwise, by the base's name.
        rows: the tokens of those of `whole` that are rows of an embedding.
    """

    dtype: DType
    stacks: Mapping[str, Stack]
    whole: Mapping[str, TensorMerge]
    copied: int | None = None
    own_names: Mapping[str, str] = field(default_factory=dict)
    rows: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def tensors(self, base: Mapping[str, TensorInfo]) -> list[TensorInfo]:
        """Return name, type and shape of every tensor in the file, given the base's tensors, or the rows of them."""
        infos = []
        for stack in self.stacks.values():
            infos.append(TensorInfo(stack.key("A"), self.dtype, (stack.width, stack.like.a.shape[1])))
            infos.append(TensorInfo(stack.key("B"), self.dtype, (stack.like.b.shape[0], stack.width)))
        return infos + [TensorInfo(self.key(name), step.dtype, base[name].shape) for name, step in self.whole.items()]

    def key(self, name: str) -> str:
        """Return the name in the file for a tensor that replaces the base's."""
        own = self.own_names.get(name, name)
        module, _, kind = own.rpartition(".")
        if name in self.rows:
            return f"{PREFIX}{module}{TOKEN_ROWS}"
        # PEFT moves a wrapped layer and its bias one level deeper.
        return f"{PREFIX}{module}.base_layer.{kind}" if module in self.stacks else PREFIX + own


class AdapterWriter:
    """Writes the tensors of several merged adapters; each input tensor is read once for all of them."""

    def __init__(
        self,
        adapters: Mapping[str, Adapter],
        modules: Mapping[str, Mapping[int, LowRank]],
        whole: ModelPlan,
        outputs: Sequence[tuple[CheckpointWriter, AdapterOutput]],
        progress: Progress,
    ) -> None:
        """Bind policies by name, their modules by name and policy, the plan of tensors saved whole, and open files."""
        self.nonfinite = whole.nonfinite()
        self._adapters, self._modules, self._whole, self._outputs = list(adapters.values()), modules, whole, outputs
        self._inputs = [f"policy `{name}`" for name in adapters]
        self._tensors = whole.base.tensors
        self._progress = progress
        factors = [info for alike in modules.values() for one in alike.values() for info in (one.a, one.b)]
        progress.expect(total_bytes([*factors, *(self._tensors[name] for name in whole.names)]))

    def write(self) -> None:
        """Write every tensor of every output."""

        def worker() -> Callable[[Item], None]:
            workspace = self._whole.workspace()
            return lambda item: item(workspace)

        self._progress.start("merging tensors", counted=True)
        share_out(list(self._items()), worker)

    def _items(self) -> Iterator[Item]:
        """Yield the work in pieces, module by module."""
        for name, modules in self._modules.items():
            for index, module in modules.items():
                for start, count in blocks_of(module.a.elements):
                    yield partial(self._write_a, name, index, module, start, count)
            rows = next(iter(modules.values())).b.shape[0]
            step = max(1, BLOCK // sum(module.b.shape[1] for module in modules.values()))
            for first in range(0, rows, step):
                yield partial(self._write_b, name, first, min(step, rows - first))
        for name in self._whole.names:
            for start, count in blocks_of(self._tensors[name].elements):
                yield partial(self._write_whole, name, start, count)

    def _write_a(self, name: str, index: int, module: LowRank, start: int, count: int, _: Workspace) -> None:
        """Write a block of one policy's A below the A of the policies before it."""
        raw, size = self._read(index, module.a, start, count), module.rank * module.a.shape[1]
        cast = {module.a.dtype: raw}
        for writer, output, stack in self._stacks(name):
            for part in (part for part in stack.parts if part.policy == index):
                if output.dtype not in cast:
                    cast[output.dtype] = np.empty(count, output.dtype.storage)
                    self._count_overflow(module.a.name, int(kernels.cast(raw, cast[output.dtype])), index)
                above = part.first * module.a.shape[1]
                # An expert's rows follow those of the other policies for it.
                for expert in range(start // size, (start + count - 1) // size + 1):
                    first, last = max(start, expert * size), min(start + count, (expert + 1) * size)
                    place = expert * (stack.rank * module.a.shape[1] - size) + above + first
                    writer.write(stack.key("A"), place, cast[output.dtype][first - start : last - start])
        self._progress.advance(raw.nbytes)

    def _write_b(self, name: str, first: int, rows: int, _: Workspace) -> None:
        """Write some rows of every policy's B side by side."""
        raw = {}
        for index, module in self._modules[name].items():
            width = module.b.shape[1]
            raw[index] = self._read(index, module.b, first * width, rows * width)
        for writer, output, stack in self._stacks(name):
            if stack.parts:
                values = self._side_by_side(name, raw, rows, stack, output.dtype)
                writer.write(stack.key("B"), first * stack.width, values)
        self._progress.advance(sum(read.nbytes for read in raw.values()))

    def _side_by_side(self, name: str, raw: Mapping[int, Array], rows: int, stack: Stack, dtype: DType) -> Array:
        modules = self._modules[name]
        only = stack.parts[0]
        if len(stack.parts) == 1 and only.factor == 1 and modules[only.policy].b.dtype == dtype:
            return raw[only.policy]
        out = np.empty(rows * stack.width, dtype.storage)
        for part in stack.parts:
            width, values, place = modules[part.policy].b.shape[1], raw[part.policy], part.first * stack.experts
            bad = int(kernels.place_columns(values, width, part.factor, place, stack.width, out))
            self._count_overflow(modules[part.policy].b.name, bad, part.policy)
        return out

    def _read(self, index: int, info: TensorInfo, start: int, count: int) -> Array:
        """Read a block of a policy's factor, and count values that are not finite."""
        raw = self._adapters[index].read(info.name, start, count)
        self.nonfinite.add(info.name, self._inputs[index], int(kernels.count_nonfinite(raw)))
        return raw

    def _count_overflow(self, name: str, bad: int, index: int) -> None:
        """Count infinite values of the result, unless the input has some too."""
        if bad and not self.nonfinite.counted(name, self._inputs[index]):
            self.nonfinite.add(name, "the result", bad)

    def _write_whole(self, name: str, start: int, count: int, workspace: Workspace) -> None:
        """Merge a block of a tensor that replaces the base's."""
        wanted = [(writer, output) for writer, output in self._outputs if name in output.whole]
        steps = [output.whole[name] for _, output in wanted]
        workspace.load(name, start, count)
        merged = workspace.merge(steps)
        for (writer, output), (values, _) in zip(wanted, merged, strict=True):
            writer.write(output.key(name), start, values)
        self.nonfinite.look(workspace, name, steps, [bad for _, bad in merged] or [0])
        self._progress.advance(count * self._tensors[name].dtype.itemsize)

    def _stacks(self, name: str) -> Iterator[tuple[CheckpointWriter, AdapterOutput, Stack]]:
        """Yield the outputs that have a module."""
        for writer, output in self._outputs:
            if name in output.stacks:
                yield writer, output, output.stacks[name]

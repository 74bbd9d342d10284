"""Merged adapters on disk: stacked factors in one file, and the settings that PEFT reads."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from rewarded_lines.checkpoints.adapters import PREFIX, Adapter, LowRank
from rewarded_lines.checkpoints.dtypes import DType
from rewarded_lines.checkpoints.headers import TensorInfo
from rewarded_lines.checkpoints.reader import total_bytes
from rewarded_lines.checkpoints.writer import CheckpointWriter
from rewarded_lines.kernels import kernels
from rewarded_lines.kernels.blocks import BLOCK, Array, TensorMerge, Workspace, blocks_of
from rewarded_lines.kernels.thread_pool import share_out
from rewarded_lines.merger.model_plan import ModelPlan
from rewarded_lines.progress import Progress

Item = Callable[[Workspace], None]


@dataclass(frozen=True)
class Part:
    """One policy's part of a stacked module: B times `factor`, from row `first` of A and column `first` of B on."""

    policy: int
    factor: float
    first: int


@dataclass(frozen=True)
class Stack:
    """A module of the merged adapter, of rank Σr; zero without parts. Its factors are named as those of `like`."""

    like: LowRank
    rank: int
    parts: tuple[Part, ...]

    def key(self, factor: str) -> str:
        """Return the name of A or B in the file."""
        kind = f"lora_embedding_{factor}" if self.like.embedding else f"lora_{factor}.weight"
        return f"{PREFIX}{self.like.module}.{kind}"


@dataclass(frozen=True)
class AdapterOutput:
    """One merged adapter.

    Attributes:
        dtype: of A and B.
        stacks: by module.
        whole: the merges of tensors that replace the base's, by the base's name.
        copied: the policy that is repeated with its settings; None if the output is computed.
        own_names: the model's names for tensors that the base names otherwise, by the base's name.
    """

    dtype: DType
    stacks: Mapping[str, Stack]
    whole: Mapping[str, TensorMerge]
    copied: int | None = None
    own_names: Mapping[str, str] = field(default_factory=dict)

    def tensors(self, base: Mapping[str, TensorInfo]) -> list[TensorInfo]:
        """Return name, type and shape of every tensor in the file, given the base's tensors."""
        infos = []
        for stack in self.stacks.values():
            infos.append(TensorInfo(stack.key("A"), self.dtype, (stack.rank, stack.like.a.shape[1])))
            infos.append(TensorInfo(stack.key("B"), self.dtype, (stack.like.b.shape[0], stack.rank)))
        return infos + [TensorInfo(self.key(name), step.dtype, base[name].shape) for name, step in self.whole.items()]

    def key(self, name: str) -> str:
        """Return the name in the file for a tensor that replaces the base's."""
        name = self.own_names.get(name, name)
        module, _, kind = name.rpartition(".")
        # PEFT moves a wrapped layer and its bias one level deeper.
        return f"{PREFIX}{module}.base_layer.{kind}" if module in self.stacks else PREFIX + name


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
            step = max(1, BLOCK // sum(module.rank for module in modules.values()))
            for first in range(0, rows, step):
                yield partial(self._write_b, name, first, min(step, rows - first))
        for name in self._whole.names:
            for start, count in blocks_of(self._tensors[name].elements):
                yield partial(self._write_whole, name, start, count)

    def _write_a(self, name: str, index: int, module: LowRank, start: int, count: int, _: Workspace) -> None:
        """Write a block of one policy's A below the A of the policies before it."""
        raw = self._read(index, module.a, start, count)
        cast = {module.a.dtype: raw}
        for writer, output, stack in self._stacks(name):
            for part in (part for part in stack.parts if part.policy == index):
                if output.dtype not in cast:
                    cast[output.dtype] = np.empty(count, output.dtype.storage)
                    self._count_overflow(module.a.name, int(kernels.cast(raw, cast[output.dtype])), index)
                writer.write(stack.key("A"), part.first * module.a.shape[1] + start, cast[output.dtype])
        self._progress.advance(raw.nbytes)

    def _write_b(self, name: str, first: int, rows: int, _: Workspace) -> None:
        """Write some rows of every policy's B side by side."""
        raw = {}
        for index, module in self._modules[name].items():
            raw[index] = self._read(index, module.b, first * module.rank, rows * module.rank)
        for writer, output, stack in self._stacks(name):
            if stack.parts:
                values = self._side_by_side(name, raw, rows, stack, output.dtype)
                writer.write(stack.key("B"), first * stack.rank, values)
        self._progress.advance(sum(read.nbytes for read in raw.values()))

    def _side_by_side(self, name: str, raw: Mapping[int, Array], rows: int, stack: Stack, dtype: DType) -> Array:
        modules = self._modules[name]
        only = stack.parts[0]
        if len(stack.parts) == 1 and only.factor == 1 and modules[only.policy].b.dtype == dtype:
            return raw[only.policy]
        out = np.empty(rows * stack.rank, dtype.storage)
        for part in stack.parts:
            width, values = modules[part.policy].rank, raw[part.policy]
            bad = int(kernels.place_columns(values, width, part.factor, part.first, stack.rank, out))
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


def adapter_config(adapters: Sequence[Adapter], output: AdapterOutput, modules: int, base: str) -> dict[str, Any]:
    """Return the adapter_config.json of an output: α = r for every module, so that its scaling is 1.

    r is the largest rank, by which engines allocate memory. `rank_pattern` and `alpha_pattern` name modules of another
    rank, anchored and in full. An output that repeats a policy keeps that policy's settings. `modules` is the number
    of modules of all policies; `base` is recorded if the policies name different bases or none.
    """
    if output.copied is not None:
        return dict(adapters[output.copied].config.content)
    rank = max((stack.rank for stack in output.stacks.values()), default=1)
    # PEFT adds `(.*\.)?(` before a pattern and `)$` after it.
    others = {f"^{re.escape(name)}": stack.rank for name, stack in output.stacks.items() if stack.rank != rank}
    contents = [adapter.config.content for adapter in adapters]
    shared: dict[str, Any] = {}
    for key in ("auto_mapping", "base_model_name_or_path", "revision", "task_type"):
        first, *rest = (content.get(key) for content in contents)
        shared[key] = first if all(value == first for value in rest) else None
    return {
        "auto_mapping": shared["auto_mapping"],
        "base_model_name_or_path": shared["base_model_name_or_path"] or base,
        "bias": _bias(adapters, output),
        "fan_in_fan_out": any(adapter.config.fan_in_fan_out for adapter in adapters),
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "modules_to_save": _modules_to_save(adapters, output),
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": others,
        "alpha_pattern": dict(others),
        "revision": shared["revision"],
        "task_type": shared["task_type"],
        "use_dora": False,
        "use_rslora": False,
        **_targets(contents, list(output.stacks), modules),
    }


def _targets(contents: Sequence[Mapping[str, Any]], names: list[str], modules: int) -> dict[str, Any]:
    """Return the keys that choose modules: the policies' own if they are equal, else every module by name."""
    keys = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
    wanted = [[_sorted(content.get(key)) for key in keys] for content in contents]
    if all(other == wanted[0] for other in wanted) and len(names) == modules:
        return dict(zip(keys, wanted[0], strict=True))
    return dict.fromkeys(keys) | {"target_modules": names}


def _modules_to_save(adapters: Sequence[Adapter], output: AdapterOutput) -> list[str] | None:
    """Return the policies' entries for a tensor saved whole, or for a module that contains one."""
    parts = [output.own_names.get(name, name).split(".")[:-1] for name in output.whole]
    around = {".".join(names[:count]) for names in parts for count in range(1, len(names) + 1)}
    entries = sorted({entry for adapter in adapters for entry in adapter.config.modules_to_save})
    return [entry for entry in entries if any(name.endswith(entry) for name in around)] or None


def _bias(adapters: Sequence[Adapter], output: AdapterOutput) -> str:
    """Return the widest of the policies' settings, "none" if the output has no biases."""
    kinds = {adapter.config.bias for adapter in adapters}
    if not any(name.endswith(".bias") for name in output.whole):
        return "none"
    return next((kind for kind in ("all", "lora_only") if kind in kinds), "none")


def _sorted(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, list) and all(isinstance(v, str) for v in value) else value

"""Merged adapters written: every factor read once and placed into all outputs, and the settings that PEFT reads."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from rewarded_lines.checkpoints.adapters import ADAPTER_FILE, LowRank
from rewarded_lines.checkpoints.dtypes import DType
from rewarded_lines.checkpoints.reader import total_bytes
from rewarded_lines.checkpoints.writer import CheckpointWriter
from rewarded_lines.planning.adapters import AdapterOutput, AdapterPlan, Stack, whole_key
from rewarded_lines.planning.plan import MergeSpec
from rewarded_lines.progress import Progress
from rewarded_lines.streaming import kernels
from rewarded_lines.streaming.blocks import BLOCK, Workspace, blocks_of
from rewarded_lines.streaming.pool import share_out

Array = np.ndarray[Any, Any]
Item = Callable[[Workspace], None]
# PEFT loads one file.
_ONE_FILE = 1 << 62


class AdapterWriter:
    """Writes the tensors of several merged adapters, each input tensor read once for all."""

    def __init__(self, plan: AdapterPlan, specs: Sequence[MergeSpec], progress: Progress) -> None:
        """Plan the outputs; no file is opened yet.

        Args:
            plan: the inputs.
            specs: of the outputs.
            progress: is told of the bytes that are read.
        """
        self.nonfinite = plan.whole.nonfinite()
        self._plan = plan
        self._specs = specs
        self._outputs = [plan.output(spec) for spec in specs]
        self._writers: list[CheckpointWriter] = []
        self._inputs = [f"policy `{name}`" for name in plan.policies]
        self._progress = progress
        factors = [info for modules in plan.modules.values() for one in modules.values() for info in (one.a, one.b)]
        progress.expect(total_bytes([*factors, *(plan.base.tensors[name] for name in plan.whole.names)]))

    def write(self, folders: Sequence[Path]) -> None:
        """Write adapter_model.safetensors of every output."""
        self._progress.start("merging tensors", counted=True)
        with ExitStack() as stack:
            for folder, spec in zip(folders, self._specs, strict=True):
                writer = CheckpointWriter(folder, self._plan.outputs(spec), _ONE_FILE, ADAPTER_FILE)
                self._writers.append(stack.enter_context(writer))
            share_out(list(self._items()), self._worker)

    def _worker(self) -> Callable[[Item], None]:
        workspace = self._plan.whole.workspace()
        return lambda item: item(workspace)

    def _items(self) -> Iterator[Item]:
        """Yield pieces of work, in the order of the modules."""
        for name, modules in self._plan.modules.items():
            for index, module in modules.items():
                for start, count in blocks_of(module.a.elements):
                    yield partial(self._write_a, name, index, module, start, count)
            ranks = sum(module.rank for module in modules.values())
            rows = next(iter(modules.values())).b.shape[0]
            for first in range(0, rows, max(1, BLOCK // ranks)):
                yield partial(self._write_b, name, first, min(max(1, BLOCK // ranks), rows - first))
        for name in self._plan.whole.names:
            for start, count in blocks_of(self._plan.base.tensors[name].elements):
                yield partial(self._write_whole, name, start, count)

    def _write_a(self, name: str, index: int, module: LowRank, start: int, count: int, _: Workspace) -> None:
        """Place a run of one policy's A below those of the policies before it."""
        raw = self._plan.adapters[index].read(module.a.name, start, count)
        self.nonfinite.add(module.a.name, self._inputs[index], int(kernels.count_nonfinite(raw)))
        cast = {module.a.dtype: raw}
        for writer, output, stack in self._stacks(name):
            for part in stack.parts:
                if part.policy == index:
                    if output.dtype not in cast:
                        cast[output.dtype] = np.empty(count, output.dtype.storage)
                        self._finite(module.a.name, int(kernels.cast(raw, cast[output.dtype])), index)
                    writer.write(stack.a, part.first * module.a.shape[1] + start, cast[output.dtype])
        self._progress.advance(raw.nbytes)

    def _write_b(self, name: str, first: int, rows: int, _: Workspace) -> None:
        """Place some rows of every policy's B side by side."""
        raw: dict[int, Array] = {}
        for index, module in self._plan.modules[name].items():
            raw[index] = self._plan.adapters[index].read(module.b.name, first * module.rank, rows * module.rank)
            self.nonfinite.add(module.b.name, self._inputs[index], int(kernels.count_nonfinite(raw[index])))
        for writer, output, stack in self._stacks(name):
            if stack.parts:
                writer.write(stack.b, first * stack.rank, self._side_by_side(name, raw, rows, stack, output.dtype))
        self._progress.advance(sum(values.nbytes for values in raw.values()))

    def _side_by_side(self, name: str, raw: Mapping[int, Array], rows: int, stack: Stack, dtype: DType) -> Array:
        modules = self._plan.modules[name]
        only = stack.parts[0]
        if len(stack.parts) == 1 and only.factor == 1 and modules[only.policy].b.dtype == dtype:
            return raw[only.policy]
        out = np.empty(rows * stack.rank, dtype.storage)
        for part in stack.parts:
            width, values = modules[part.policy].rank, raw[part.policy]
            bad = int(kernels.place_columns(values, width, part.factor, part.first, stack.rank, out))
            self._finite(modules[part.policy].b.name, bad, part.policy)
        return out

    def _finite(self, name: str, bad: int, index: int) -> None:
        """Count what became infinite in the result; what was so before is the input's."""
        if bad and not self.nonfinite.counted(name, self._inputs[index]):
            self.nonfinite.add(name, "the result", bad)

    def _write_whole(self, name: str, start: int, count: int, workspace: Workspace) -> None:
        """Merge a run of a tensor that stands in the place of the base's."""
        wanted = [
            (writer, whole_key(name, output), output.whole[name])
            for writer, output in zip(self._writers, self._outputs, strict=True)
            if name in output.whole
        ]
        workspace.load(name, start, count)
        steps = [step for _, _, step in wanted]
        bad = []
        for (writer, key, _), (values, wrong) in zip(wanted, workspace.merge(steps), strict=True):
            writer.write(key, start, values)
            bad.append(wrong)
        self.nonfinite.look(workspace, name, steps, bad or [0])
        self._progress.advance(count * self._plan.base.tensors[name].dtype.itemsize)

    def _stacks(self, name: str) -> Iterator[tuple[CheckpointWriter, AdapterOutput, Stack]]:
        """Yield the outputs that have a module."""
        for writer, output in zip(self._writers, self._outputs, strict=True):
            if name in output.stacks:
                yield writer, output, output.stacks[name]


def adapter_config(plan: AdapterPlan, spec: MergeSpec) -> dict[str, Any]:
    """Return the adapter_config.json of an output: α = r for every module, so that its scaling is 1.

    r is the largest rank, which engines that allocate by it need; modules of another one are named in `rank_pattern`
    and `alpha_pattern`, anchored and in full. A repeated policy keeps its own settings.
    """
    output = plan.output(spec)
    if output.copied is not None:
        return dict(plan.adapters[output.copied].config.content)
    rank = max((stack.rank for stack in output.stacks.values()), default=1)
    others = {_pattern(name): stack.rank for name, stack in output.stacks.items() if stack.rank != rank}
    contents = [adapter.config.content for adapter in plan.adapters]
    return {
        "auto_mapping": _shared(contents, "auto_mapping"),
        "base_model_name_or_path": _shared(contents, "base_model_name_or_path") or str(plan.base.folder.resolve()),
        "bias": _bias(plan, output),
        "fan_in_fan_out": any(adapter.config.fan_in_fan_out for adapter in plan.adapters),
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "modules_to_save": _modules_to_save(plan, output),
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": others,
        "alpha_pattern": dict(others),
        "revision": _shared(contents, "revision"),
        "task_type": _shared(contents, "task_type"),
        "use_dora": False,
        "use_rslora": False,
        **_targets(plan, output, contents),
    }


def _targets(plan: AdapterPlan, output: AdapterOutput, contents: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the keys that choose modules: the policies' own where they are the same, else every module by name."""
    keys = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
    wanted = [[_sorted(content.get(key)) for key in keys] for content in contents]
    if all(other == wanted[0] for other in wanted) and len(output.stacks) == len(plan.modules):
        return dict(zip(keys, wanted[0], strict=True))
    return dict.fromkeys(keys) | {"target_modules": list(output.stacks)}


def _modules_to_save(plan: AdapterPlan, output: AdapterOutput) -> list[str] | None:
    """Return the policies' entries that one of the tensors saved whole belongs to."""
    modules = [name.rpartition(".")[0] for name in output.whole]
    entries = sorted({entry for adapter in plan.adapters for entry in adapter.config.modules_to_save})
    around = {
        ".".join(parts[:count]) for parts in (m.split(".") for m in modules) for count in range(1, len(parts) + 1)
    }
    return [entry for entry in entries if any(name.endswith(entry) for name in around)] or None


def _bias(plan: AdapterPlan, output: AdapterOutput) -> str:
    """Return the widest of the policies' settings, if the output has biases at all."""
    kinds = {adapter.config.bias for adapter in plan.adapters}
    if not any(name.endswith(".bias") for name in output.whole):
        return "none"
    return next((kind for kind in ("all", "lora_only") if kind in kinds), "none")


def _shared(contents: Sequence[Mapping[str, Any]], key: str) -> Any:
    """Return the value that all adapters have under a key, else None."""
    values = [content.get(key) for content in contents]
    return values[0] if all(value == values[0] for value in values) else None


def _sorted(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, list) and all(isinstance(v, str) for v in value) else value


def _pattern(module: str) -> str:
    """Return a pattern that matches one module: PEFT sets `(.*\\.)?(` before it and `)$` behind it."""
    return "^" + re.escape(module)

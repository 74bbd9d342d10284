"""Adapters merged into an adapter: Σ γᵢ·Bᵢ·Aᵢ is B·A with the Aᵢ stacked and the γᵢ·Bᵢ side by side.

Averaging A and B separately, as in the first code of Rewarded Soups, gives cross terms Bᵢ·Aⱼ instead.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from copy import copy
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from rewarded_lines.checkpoints.adapter_config import ADAPTER_CONFIG
from rewarded_lines.checkpoints.adapters import ADAPTER_FILE, Adapter, BareBase
from rewarded_lines.checkpoints.dtypes import BF16, F16, F32, DType, widest
from rewarded_lines.checkpoints.hashing import file_hash
from rewarded_lines.checkpoints.headers import TensorInfo
from rewarded_lines.checkpoints.low_rank import LowRank, paths_of
from rewarded_lines.checkpoints.reader import Checkpoint
from rewarded_lines.checkpoints.tensor_depth import Depths
from rewarded_lines.checkpoints.writer import CheckpointWriter
from rewarded_lines.folders import write_json
from rewarded_lines.kernels.nonfinite import NonFinite
from rewarded_lines.kernels.tensor_merge import TensorMerge
from rewarded_lines.merger.adapter_settings import adapter_config
from rewarded_lines.merger.lora_folding import SelectedRows, ZeroBase, stored_shape
from rewarded_lines.merger.lora_stacking import AdapterOutput, AdapterWriter, Part, Stack
from rewarded_lines.merger.model_plan import ModelPlan
from rewarded_lines.merger.plan import Plan
from rewarded_lines.merger.spec import MergeSpec
from rewarded_lines.progress import SILENT, Progress

# bfloat16 has the range of float32, so a power of two up to this one only shifts a usual weight's exponent.
_PLAIN_EXPONENT = 32
_OUTPUTS_KEPT = 64


class AdapterPlan(Plan):
    """Merges adapters into adapters.

    With sᵢ the scale of policy i's module and γᵢ = sᵢ·λᵢ·αᵢ/rᵢ (αᵢ/√rᵢ for rsLoRA):

        Σ γᵢ·Bᵢ·Aᵢ = [γ₁·B₁ … γ_N·B_N] · [A₁; …; A_N],   of rank Σ rᵢ.

    Policies of weight 0 and modules of scale 0 take no rank. γᵢ is multiplied into B, in float64, and rounded once. So
    the output's own scaling is 1 for every module, also in engines that read α and r but no patterns (vLLM). In 16
    bits that rounding would cost up to 2⁻⁹ of each value. So 16-bit adapters give a float32 adapter, unless every γᵢ
    is a power of two (bfloat16) or 1. An output that equals one policy (λ = 1, s = 1) repeats its tensors bit for bit,
    with its own α and r.

    Parts are stacked in the order of the adapters' hashes: permuting the policies changes no bit.
    """

    kind = "adapter"
    policies: Mapping[str, Adapter]

    def __init__(
        self, base: Checkpoint | BareBase, policies: Mapping[str, Adapter], depths: Depths, dtype: str = "auto"
    ) -> None:
        """Bind the inputs; `plan_adapters` returns a checked plan. `dtype` is one of `DTYPES`."""
        super().__init__(base, policies, depths, dtype)
        self.adapters = list(policies.values())
        modules: dict[str, dict[int, LowRank]] = {}
        for index, adapter in enumerate(self.adapters):
            for name, module in adapter.modules.items():
                modules.setdefault(name, {})[index] = module
        self.modules = {name: modules[name] for name in sorted(modules, key=_natural)}
        self._own_names = {
            theirs: mine for adapter in reversed(self.adapters) for theirs, mine in adapter.own_names.items()
        }
        rows: dict[str, set[int]] = {}
        for name, one in ((name, one) for adapter in self.adapters for name, one in adapter.rows.items()):
            rows.setdefault(name, set()).update(one.tokens)
        self.rows = {name: tuple(sorted(tokens)) for name, tokens in rows.items()}
        saved = sorted({*self.rows, *(name for adapter in self.adapters for name in adapter.saved)}, key=_natural)
        enlarged = {name for adapter in self.adapters for name in adapter.enlarged} - set(saved)
        self.enlarged = [name for name in base.tensors if name in enlarged]
        source = SelectedRows(base, self.rows) if self.rows else base
        self.whole = ModelPlan(source, policies, [*self.enlarged, *saved], depths, dtype)
        self.reads_base = bool(saved)
        self._repeats = True
        self._outputs: dict[tuple[object, ...], AdapterOutput] = {}

    def without_repeats(self) -> AdapterPlan:
        """Return the plan with scaling 1 in every output, also in one that equals a policy.

        For engines that read α and r but no patterns: a policy's own settings may have patterns.
        """
        plan = copy(self)
        plan._repeats, plan._outputs = False, {}
        return plan

    def only(self, layer: str) -> AdapterPlan:
        """Return the plan `without_repeats`, and with only the modules of one kind of layer, e.g. q_proj."""
        plan = self.without_repeats()
        plan.modules = {name: one for name, one in self.modules.items() if name.rpartition(".")[2] == layer}
        return plan

    def output(self, spec: MergeSpec) -> AdapterOutput:
        """Return the stacked modules and the tensors saved whole of one output."""
        key = (spec.factors, spec.schedule)
        if key not in self._outputs:
            if len(self._outputs) >= _OUTPUTS_KEPT:
                # A server may see thousands of merges.
                del self._outputs[next(iter(self._outputs))]
            self._outputs[key] = self._output(spec)
        return self._outputs[key]

    def _output(self, spec: MergeSpec) -> AdapterOutput:
        copied = self._copied(spec)
        whole = self._whole(spec, copied)
        stacks = {name: self._stack(name, spec, copied) for name in self.modules}
        if not any(stack.parts for stack in stacks.values()) and not whole:
            # PEFT loads no adapter without modules, so all of them are written, of rank 1 and zero.
            stacks = {name: replace(stack, rank=1) for name, stack in stacks.items()}
        else:
            stacks = {name: stack for name, stack in stacks.items() if stack.parts}
        paths = paths_of({name: stack.like.experts > 0 for name, stack in stacks.items()})
        stacks = {name: replace(stack, path=paths[name]) for name, stack in stacks.items()}
        return AdapterOutput(self._output_dtype(stacks), stacks, whole, copied, self._own_names, self.rows)

    def outputs(self, spec: MergeSpec) -> list[TensorInfo]:
        """See `Plan.outputs`."""
        return self.output(spec).tensors(self.whole.base.tensors)

    def rank(self, spec: MergeSpec) -> int:
        """See `Plan.rank`."""
        return max((stack.rank for stack in self.output(spec).stacks.values()), default=0)

    def prepare(self, specs: Sequence[MergeSpec]) -> None:
        """See `Plan.prepare`; only tensors that policies save whole are measured."""
        self.whole.prepare(specs)

    def auto_alpha(self, specs: Sequence[MergeSpec]) -> list[float]:
        """See `Plan.auto_alpha`. It computes B·A, which takes as long as folding the adapters into their base."""
        return self._residuals.auto_alpha(specs)

    def matched_alpha(self, weights: Sequence[float], like: MergeSpec) -> float:
        """See `Plan.matched_alpha`. The first call computes B·A; later calls reuse its measures."""
        return self._residuals.matched_alpha(weights, like)

    def write(
        self, specs: Sequence[MergeSpec], folders: Sequence[Path], max_shard_size: int, progress: Progress = SILENT
    ) -> NonFinite:
        """See `Plan.write`; an adapter is always one file."""
        outputs = [self.output(spec) for spec in specs]
        with ExitStack() as stack:
            files = []
            for folder, output in zip(folders, outputs, strict=True):
                tensors = output.tensors(self.whole.base.tensors)
                file = CheckpointWriter(folder, tensors, single_file=ADAPTER_FILE, together=len(folders))
                files.append((stack.enter_context(file), output))
            writer = AdapterWriter(self.policies, self.modules, self.whole, files, progress)
            writer.write()
        for folder, output in zip(folders, outputs, strict=True):
            self.carried.copy(folder)
            config = adapter_config(self.adapters, output, len(self.modules), str(self.base.folder.resolve()))
            write_json(folder / ADAPTER_CONFIG, config)
        return writer.nonfinite

    @cached_property
    def _residuals(self) -> ModelPlan:
        """Return a plan whose residuals are the adapters' B·A, over a base of zeros."""
        modules = [next(iter(alike.values())) for alike in self.modules.values()]
        infos = {one.tensor: TensorInfo(one.tensor, F32, stored_shape(one, self.base)) for one in modules}
        names = list(dict.fromkeys([*infos, *self.whole.names]))
        return ModelPlan(ZeroBase(self.base, infos), self.policies, names, self.depths)

    @cached_property
    def _hashes(self) -> list[str]:
        # The last file has the settings.
        return ["".join(map(file_hash, adapter.files[:-1])) for adapter in self.adapters]

    def _stack(self, name: str, spec: MergeSpec, copied: int | None) -> Stack:
        modules, factors = self.modules[name], []
        for index in [index for index in modules if index < len(spec.factors)]:
            scale = self.scale(modules[index].tensor, spec, index)
            factor = scale * spec.factors[index] * (1.0 if index == copied else modules[index].scaling)
            if factor != 0:
                factors.append((self._hashes[index], factor, index))
        parts, rank = [], 0
        for _, factor, index in sorted(factors):
            parts.append(Part(index, factor, rank))
            rank += modules[index].rank
        return Stack(next(iter(modules.values())), rank, tuple(parts))

    def _whole(self, spec: MergeSpec, copied: int | None) -> dict[str, TensorMerge]:
        """Return the merges of the tensors saved whole; only enlarged embeddings if all results equal the base's."""
        tensors = self.whole.base.tensors
        kept = {name: TensorMerge(self._dtype or tensors[name].dtype, copy=0) for name in self.enlarged}
        if copied is not None:
            adapter = self.adapters[copied]
            kinds = adapter.saved | {name: rows.info for name, rows in adapter.rows.items()}
            return kept | {name: TensorMerge(self._dtype or kinds[name].dtype, copied + 1) for name in sorted(kinds)}
        steps = {name: self.whole.step(name, spec) for name in self.whole.names if name not in kept}
        return kept | (steps if any(step.copy != 0 for step in steps.values()) else {})

    def _copied(self, spec: MergeSpec) -> int | None:
        """Return the only policy with a weight, if s·λ is 1 for all its modules and tensors."""
        active = [index for index, weight in enumerate(spec.factors) if weight != 0]
        if len(active) != 1 or not self._repeats:
            return None
        adapter = self.adapters[active[0]]
        # The file has the rows of all policies, in order.
        if {name: rows.tokens for name, rows in adapter.rows.items()} != self.rows:
            return None
        own = [*adapter.saved, *adapter.rows, *(module.tensor for module in adapter.modules.values())]
        scales = (self.scale(name, spec, active[0]) for name in own)
        return active[0] if all(scale * spec.factors[active[0]] == 1 for scale in scales) else None

    def _output_dtype(self, stacks: Mapping[str, Stack]) -> DType:
        if self._dtype:
            return self._dtype
        parts = [(self.modules[name][part.policy], part) for name, stack in stacks.items() for part in stack.parts]
        kind = widest([info.dtype for module, _ in parts for info in (module.a, module.b)] or [F32])
        return kind if all(_is_exact(part.factor, kind) for _, part in parts) else F32


def _is_exact(factor: float, kind: DType) -> bool:
    """True if multiplying a tensor of this type by a factor loses no more than float32 rounding."""
    mantissa, exponent = math.frexp(factor)
    if kind == BF16:
        return abs(mantissa) == 0.5 and abs(exponent) <= _PLAIN_EXPONENT
    return factor == 1 if kind == F16 else True


def _natural(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts block 10 after block 9."""
    return [(int(part), "") if part.isdigit() and part.isascii() else (-1, part) for part in name.split(".")]

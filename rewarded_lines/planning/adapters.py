"""Adapters merged into an adapter: Σ Bᵢ·Aᵢ is B·A with the Aᵢ stacked and the Bᵢ, each with its factor, side by side.

Averaging A and B apart, as the first code of Rewarded Soups did, is another thing: it has cross terms Bᵢ·Aⱼ.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property

from rewarded_lines.checkpoints.adapters import PREFIX, Adapter, BareBase, LowRank
from rewarded_lines.checkpoints.dtypes import BF16, F16, F32, FLOATS, DType, widest
from rewarded_lines.checkpoints.hashing import file_hash
from rewarded_lines.checkpoints.headers import TensorInfo
from rewarded_lines.checkpoints.layers import Depths, find_depths, with_declared_blocks
from rewarded_lines.checkpoints.reader import Checkpoint
from rewarded_lines.errors import Problem, UserError
from rewarded_lines.planning.adapter_compatibility import check_adapters, notes_on
from rewarded_lines.planning.folding import ZeroBase, stored_shape
from rewarded_lines.planning.inputs import open_base, open_policies
from rewarded_lines.planning.plan import DTYPES, MergePlan, MergeSpec, choose
from rewarded_lines.rules.lines import tensor_scale
from rewarded_lines.streaming.blocks import TensorMerge

# bfloat16 has the range of float32: such a power of two moves only the exponent of any weight there is.
_PLAIN_EXPONENT = 32


@dataclass(frozen=True)
class Part:
    """One policy's place in a stacked module.

    Attributes:
        policy: its index.
        factor: what its B is multiplied by.
        first: its first row in A, and its first column in B.
    """

    policy: int
    factor: float
    first: int


@dataclass(frozen=True)
class Stack:
    """A module of the merged adapter, of rank Σr; without parts it is zero."""

    like: LowRank
    rank: int
    parts: tuple[Part, ...]

    @property
    def a(self) -> str:
        """Return the name of A in the file."""
        return f"{PREFIX}{self.like.module}.{'lora_embedding_A' if self.like.embedding else 'lora_A.weight'}"

    @property
    def b(self) -> str:
        """Return the name of B in the file."""
        return f"{PREFIX}{self.like.module}.{'lora_embedding_B' if self.like.embedding else 'lora_B.weight'}"


@dataclass(frozen=True)
class AdapterOutput:
    """One merged adapter.

    Attributes:
        dtype: of A and B.
        stacks: by module.
        whole: what is wanted of tensors that stand in the place of the base's, by the base's name.
        copied: the policy that the output repeats, settings and all; None where it is computed.
    """

    dtype: DType
    stacks: Mapping[str, Stack]
    whole: Mapping[str, TensorMerge]
    copied: int | None = None


class AdapterPlan:
    """Adapters that have passed the pre-flight, to be merged into adapters.

    With s the LiNeS scale of a module and γᵢ = s·λᵢ·αᵢ/rᵢ (αᵢ/√rᵢ for rsLoRA):

        Σ γᵢ·Bᵢ·Aᵢ = [γ₁·B₁ … γ_N·B_N] · [A₁; …; A_N],   of rank Σ rᵢ.

    Policies of weight 0 and modules of scale 0 take no rank. γᵢ is folded into B, in float64, and rounded once, so
    that the output's own scaling is 1 for every module: engines that read α and r but no patterns (vLLM) then compute
    the same. In 16 bits that rounding would cost up to 2⁻⁹ of each value; so 16-bit adapters give a float32 one,
    unless every γᵢ is a power of two (bfloat16) or 1. An output that is one policy (λ = 1, s = 1) repeats its tensors
    bit for bit, with its own α and r.

    The stack's order is that of the adapters' hashes: permuting the policies changes no bit.
    """

    def __init__(
        self,
        base: Checkpoint | BareBase,
        policies: Mapping[str, Adapter],
        depths: Depths,
        dtype: str = "auto",
    ) -> None:
        """Bind the inputs; use `plan_adapters` to get a checked plan.

        Args:
            base: the SFT model, whose weights are needed only for tensors that policies save whole.
            policies: by name, in the order of the weights.
            depths: where every matrix lies.
            dtype: one of `DTYPES`.
        """
        self.base = base
        self.policies = policies
        self.depths = depths
        self.notes: list[str] = []
        # How the user named base and policies: folders, or Hub ids.
        self.reference, self.references = "", dict[str, str]()
        self.repeats = True
        self.adapters = list(policies.values())
        self.modules: dict[str, dict[int, LowRank]] = {}
        for index, adapter in enumerate(self.adapters):
            for name, module in adapter.modules.items():
                self.modules.setdefault(name, {})[index] = module
        self.modules = {name: self.modules[name] for name in sorted(self.modules, key=_natural)}
        saved = sorted({name for adapter in self.adapters for name in adapter.saved}, key=_natural)
        self.whole = MergePlan(base, policies, saved, depths, dtype)
        self._dtype = FLOATS.get(dtype)
        self._outputs: dict[tuple[object, ...], AdapterOutput] = {}

    def without_repeats(self) -> AdapterPlan:
        """Return the same plan, but with every output of scaling 1, also where it is one policy.

        That is for engines that read α and r but no patterns, which a policy's own settings may have.
        """
        plan = copy(self)
        plan.repeats, plan._outputs = False, {}
        return plan

    def only(self, layer: str) -> AdapterPlan:
        """Return the same plan for the modules alone whose names end with `layer`, e.g. q_proj; nothing is repeated."""
        plan = self.without_repeats()
        plan.modules = {name: one for name, one in self.modules.items() if name.rpartition(".")[2] == layer}
        return plan

    def output(self, spec: MergeSpec) -> AdapterOutput:
        """Return what one output is made of."""
        key = (spec.weights, spec.alpha, spec.beta, spec.outside)
        if key not in self._outputs:
            self._outputs[key] = self._output(spec)
        return self._outputs[key]

    def _output(self, spec: MergeSpec) -> AdapterOutput:
        scales = {name: self._scale(f"{name}.weight", spec) for name in self.modules}
        copied = self._copied(spec, scales)
        whole = self._whole(spec, copied)
        stacks = {name: self._stack(name, scales[name], spec, copied) for name in self.modules}
        if not any(stack.parts for stack in stacks.values()) and not whole:
            # PEFT loads no adapter without modules: all of them, of rank 1 and zero.
            stacks = {name: replace(stack, rank=1) for name, stack in stacks.items()}
        else:
            stacks = {name: stack for name, stack in stacks.items() if stack.parts}
        return AdapterOutput(self._output_dtype(stacks), stacks, whole, copied)

    def outputs(self, spec: MergeSpec) -> list[TensorInfo]:
        """Return name, type and shape of every tensor of an output."""
        output = self.output(spec)
        infos = []
        for stack in output.stacks.values():
            infos.append(TensorInfo(stack.a, output.dtype, (stack.rank, stack.like.a.shape[1])))
            infos.append(TensorInfo(stack.b, output.dtype, (stack.like.b.shape[0], stack.rank)))
        for name, step in output.whole.items():
            infos.append(TensorInfo(whole_key(name, output), step.dtype, self.base.tensors[name].shape))
        return infos

    def scales(self, spec: MergeSpec) -> dict[str, list[float]]:
        """Return the LiNeS factor of every block, first to last, for each list of blocks."""
        return self.whole.scales(spec)

    def prepare(self, specs: Sequence[MergeSpec]) -> None:
        """Measure what the outputs need to know of tensors that are saved whole."""
        self.whole.prepare(specs)

    def auto_alpha(self, specs: Sequence[MergeSpec]) -> list[float]:
        """Return the heuristic α of each spec; see `MergePlan.auto_alpha`.

        B·A is computed for that, so it takes about as long as folding the adapters into their base.
        """
        return self._residuals.auto_alpha(specs)

    def matched_alpha(self, weights: Sequence[float], like: MergeSpec) -> float:
        """Return γ for one λ; see `MergePlan.matched_alpha`. B·A is computed once for that."""
        return self._residuals.matched_alpha(weights, like)

    @cached_property
    def _residuals(self) -> MergePlan:
        """Return a plan whose residuals are the adapters' B·A, over a base of zeros."""
        modules = [next(iter(alike.values())) for alike in self.modules.values()]
        infos = {one.tensor: TensorInfo(one.tensor, F32, stored_shape(one, self.base.config)) for one in modules}
        base = ZeroBase(self.base, infos)
        names = list(dict.fromkeys([*infos, *self.whole.names]))
        return MergePlan(base, self.policies, names, self.depths)

    @cached_property
    def _hashes(self) -> list[str]:
        return [file_hash(adapter.files[0]) for adapter in self.adapters]

    def _scale(self, tensor: str, spec: MergeSpec) -> float:
        return tensor_scale(self.depths.place[tensor], spec.alpha, spec.beta, spec.outside, tensor)

    def _stack(self, name: str, scale: float, spec: MergeSpec, copied: int | None) -> Stack:
        factors = []
        for index, module in self.modules[name].items():
            if index >= len(spec.weights):
                continue
            factor = scale * spec.weights[index] * (1.0 if index == copied else module.scaling)
            if factor != 0:
                factors.append((self._hashes[index], factor, index))
        parts, rank = [], 0
        for _, factor, index in sorted(factors):
            parts.append(Part(index, factor, rank))
            rank += self.modules[name][index].rank
        return Stack(next(iter(self.modules[name].values())), rank, tuple(parts))

    def _whole(self, spec: MergeSpec, copied: int | None) -> dict[str, TensorMerge]:
        """Return what is wanted of the tensors saved whole; nothing, if all of them are the base's own."""
        if copied is not None:
            saved = self.adapters[copied].saved
            return {name: TensorMerge(self._dtype or saved[name].dtype, copied + 1) for name in sorted(saved)}
        steps = {name: self.whole.step(name, spec) for name in self.whole.names}
        return steps if any(step.copy != 0 for step in steps.values()) else {}

    def _copied(self, spec: MergeSpec, scales: Mapping[str, float]) -> int | None:
        """Return the one policy with a weight, if s·λ is 1 for all that it changes."""
        active = [index for index, weight in enumerate(spec.weights) if weight != 0]
        if len(active) != 1 or not self.repeats:
            return None
        adapter = self.adapters[active[0]]
        saved = [self._scale(name, spec) for name in adapter.saved]
        own = [*saved, *(scales[name] for name in adapter.modules)]
        return active[0] if all(scale * spec.weights[active[0]] == 1 for scale in own) else None

    def _output_dtype(self, stacks: Mapping[str, Stack]) -> DType:
        if self._dtype:
            return self._dtype
        kinds, factors = [], []
        for name, stack in stacks.items():
            for part in stack.parts:
                module = self.modules[name][part.policy]
                kinds += [module.a.dtype, module.b.dtype]
                factors.append(part.factor)
        kind = widest(kinds or [F32])
        return kind if all(_is_exact(factor, kind) for factor in factors) else F32


def plan_adapters(
    base: str, policies: Mapping[str, str], *, dtype: str = "auto", layers: str | None = None
) -> AdapterPlan:
    """Open base and adapters, check that they fit together, and find the depth of every module.

    Args:
        base: folder or Hub id of the SFT model; its config is enough, unless policies save tensors whole.
        policies: folder or Hub id of each adapter, by name, in the order of the weights.
        dtype: one of `DTYPES`.
        layers: the block list's pattern, for layouts that are not known.

    Raises:
        UserError: with every fault of the inputs.
    """
    choose("--dtype", dtype, DTYPES)
    problems: list[Problem] = []
    opened = open_policies(policies, problems)
    adapters = {name: policy for name, policy in opened.items() if isinstance(policy, Adapter)}
    for name in opened.keys() - adapters.keys():
        what = "a whole model, whose difference from the base no adapter holds"
        problems.append(Problem(what, f"policy `{name}` ({policies[name]})", remedy="pass --as full"))
    origin = open_base(base, any(adapter.saved for adapter in adapters.values()), problems)
    if origin is not None:
        problems += check_adapters(origin, base, adapters, folded=False)
    if problems or origin is None:
        raise UserError(problems)
    names = dict.fromkeys(module.tensor for adapter in adapters.values() for module in adapter.modules.values())
    names |= dict.fromkeys(name for adapter in adapters.values() for name in adapter.saved)
    known = [*origin.tensors, *(name for name in names if name not in origin.tensors)]
    known = with_declared_blocks(known, origin.config) if isinstance(origin, BareBase) else known
    plan = AdapterPlan(origin, adapters, find_depths(known, origin.config, layers), dtype)
    plan.notes += notes_on(origin, adapters)
    plan.reference, plan.references = base, dict(policies)
    return plan


def whole_key(name: str, output: AdapterOutput) -> str:
    """Return the name in the file of a tensor that stands in the place of the base's `name`."""
    module, _, kind = name.rpartition(".")
    # PEFT puts the layer that it wraps one level deeper; its bias goes along.
    return f"{PREFIX}{module}.base_layer.{kind}" if module in output.stacks else PREFIX + name


def _is_exact(factor: float, kind: DType) -> bool:
    """Say whether a factor loses nothing beyond float32 rounding when it is folded into a type."""
    mantissa, exponent = math.frexp(factor)
    if kind == BF16:
        return abs(mantissa) == 0.5 and abs(exponent) <= _PLAIN_EXPONENT
    return factor == 1 if kind == F16 else True


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort block 10 after block 9."""
    return [(int(part), "") if part.isdigit() and part.isascii() else (-1, part) for part in re.split(r"\.", name)]

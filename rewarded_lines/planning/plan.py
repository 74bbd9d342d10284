"""A merge ready to run: checkpoints that fit together, and what every output wants of every tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from rewarded_lines.checkpoints.adapters import Adapter, BareBase
from rewarded_lines.checkpoints.dtypes import FLOATS, DType, as_torch, widest
from rewarded_lines.checkpoints.headers import TensorInfo
from rewarded_lines.checkpoints.layers import Depths, find_depths
from rewarded_lines.checkpoints.reader import Checkpoint, TensorFiles
from rewarded_lines.errors import did_you_mean, fail
from rewarded_lines.measuring.nonfinite import NonFinite
from rewarded_lines.measuring.norms import Facts, Gram
from rewarded_lines.measuring.sparsity import random_mask
from rewarded_lines.planning.folding import FoldedAdapter
from rewarded_lines.planning.inputs import check_fit, open_inputs
from rewarded_lines.rules.lines import Outside, lines_scale, tensor_scale
from rewarded_lines.rules.methods import METHODS, OptionValue, check_method, consensus, soup
from rewarded_lines.streaming.blocks import Masks, Source, TensorMerge, Workspace, blocks_of
from rewarded_lines.streaming.pool import share_out

if TYPE_CHECKING:
    import torch

DTYPES = ("auto", "float32", "bfloat16", "float16")
OUTSIDE: tuple[Outside, ...] = ("alpha", "depth")


@dataclass(frozen=True)
class MergeSpec:
    """The numbers of one merge: λ_i for each policy, the LiNeS schedule, and the method that joins residuals.

    Fewer weights than the plan has policies leave the last of those out: the merge is as if they were not there.
    """

    weights: tuple[float, ...]
    alpha: float = 1.0
    beta: float = 1.0
    method: str = "soup"
    options: Mapping[str, OptionValue] = field(default_factory=dict)
    outside: Outside = "alpha"


class MergePlan:
    """Inputs that have passed the pre-flight; says what a merge wants of each tensor, and merges single tensors."""

    def __init__(
        self,
        base: Checkpoint | BareBase,
        policies: Mapping[str, Checkpoint | Adapter],
        names: Sequence[str],
        depths: Depths,
        dtype: str = "auto",
        device: str = "cpu",
    ) -> None:
        """Bind the inputs; use `plan_merge` to get a checked plan.

        Args:
            base: the SFT model.
            policies: by name, in the order of the weights.
            names: the tensors to write, in order.
            depths: where every tensor lies.
            dtype: one of `DTYPES`; "auto" gives each tensor the widest type it has in the inputs. What an adapter adds
                to a tensor is no type of that tensor.
            device: where the arithmetic runs, "cpu" or "cuda".
        """
        self.base = base
        self.policies = policies
        self.depths = depths
        self.names = names
        self.notes: list[str] = []
        # How the user named base and policies: folders, or Hub ids.
        self.reference, self.references = "", dict[str, str]()
        # What else another process needs to make the same plan.
        self.layers: str | None = None
        self.dtype_name = dtype
        self._dtype = FLOATS.get(dtype)
        self._device = device
        self._sources: list[Source] = [
            FoldedAdapter(policy, base.config) if isinstance(policy, Adapter) else policy
            for policy in policies.values()
        ]
        self._floats = [name for name in names if base.tensors[name].dtype.floating]
        self.facts = Facts(base, self._sources, self._floats)

    def workspace(self) -> Workspace:
        """Return buffers for one thread."""
        if self._device == "cpu":
            return Workspace(self.base, self._sources)
        from rewarded_lines.streaming.gpu import DeviceWorkspace

        return DeviceWorkspace(self.base, self._sources, self._device)

    def nonfinite(self) -> NonFinite:
        """Return a count, at zero, of the values that are not finite."""
        return NonFinite(list(self.policies), self.base.tensors)

    def stored(self) -> list[TensorFiles]:
        """Return the inputs whose tensors lie in files."""
        return [source for source in [self.base, *self._sources] if isinstance(source, TensorFiles)]

    def outputs(self, _: MergeSpec | None = None) -> list[TensorInfo]:
        """Return name, type and shape of every merged tensor, in order; they are the same for every output."""
        return [TensorInfo(name, self._output_dtype(name), self.base.tensors[name].shape) for name in self.names]

    def widest_dtype(self) -> str:
        """Return the name of the widest floating-point type among the merged tensors, as configs write it."""
        kinds = [info.dtype for info in self.outputs() if info.dtype.floating]
        return widest(kinds).torch if kinds else "float32"

    def scales(self, spec: MergeSpec) -> dict[str, list[float]]:
        """Return the LiNeS factor of every block, first to last, for each list of blocks."""
        return {
            stack: [lines_scale(block, blocks, spec.alpha, spec.beta) for block in range(blocks)]
            for stack, blocks in self.depths.stacks.items()
        }

    def prepare(self, specs: Sequence[MergeSpec]) -> None:
        """Measure all that the methods of `specs` must know of whole tensors, several tensors at a time."""
        measures: dict[str, Callable[[str], object]] = {}
        for spec in specs:
            needs = METHODS[spec.method].needs
            if needs == "gram":
                measures["gram"] = self.facts.gram
            if needs == "thresholds":
                density, scope = float(spec.options["density"]), str(spec.options["scope"])
                if scope == "model" and self._floats:
                    self.facts.thresholds(self._floats[0], density, scope)
                measures[f"thresholds {density}"] = partial(self.facts.thresholds, density=density, scope=scope)
            if needs == "kept" or len(spec.weights) > 2:
                measures["digests"] = self.facts.digests
        self.facts.prepare(measures.values())

    def step(self, name: str, spec: MergeSpec, copies: bool = True) -> TensorMerge:
        """Return what one output wants of one tensor.

        Args:
            name: of the tensor.
            spec: of the output.
            copies: copy a tensor that equals an input's exactly; False has every tensor computed.
        """
        dtype = self._output_dtype(name)
        if not self.base.tensors[name].dtype.floating:
            return TensorMerge(dtype, copy=0)
        row, scale = (
            METHODS[spec.method],
            tensor_scale(self.depths.place[name], spec.alpha, spec.beta, spec.outside, name),
        )
        weights = row.weigh(spec.weights, self._gram(name, spec)) if row.weigh else spec.weights
        if copies:
            if all(weight * scale == 0 for weight in weights) or not self._touched(name, weights):
                return TensorMerge(dtype, copy=0)
            same = row.copies(spec.options, weights)
            if same is not None and weights[same] * scale == 1 and name in self._sources[same].tensors:
                return TensorMerge(dtype, copy=same + 1)
        rows = [i for i in self._order(name, weights) if weights[i] != 0 or row.rule is consensus]
        parameters, masks = self._parameters(name, spec, rows)
        taken = tuple(weights[i] for i in rows)
        return TensorMerge(dtype, None, tuple(rows), taken, scale, row.rule, row.rule is soup, parameters, masks)

    def auto_alpha(self, specs: Sequence[MergeSpec]) -> list[float]:
        """Return (‖Σ τ_i‖₁/‖τ_merged‖₁)/N for each spec, the heuristic α of LiNeS' authors for merging tasks.

        τ_merged is the method's residual before the schedule, N the number of policies.

        Raises:
            UserError: a merged residual is zero.

        Source: LiNeS, arXiv 2410.17146, section 4.2.
        """
        self.prepare(specs)
        unweighted = [0.0] * len(self.policies)
        norms = self.facts.norms(
            lambda name: [self.step(name, spec, copies=False) for spec in specs],
            lambda name: self._order(name, unweighted),
        )
        if not all(0 < joined < math.inf and total < math.inf for total, joined in norms):
            what = "the merged residual is zero or not finite, no α can be chosen"
            raise fail(what, where="--alpha auto", remedy="give a number")
        return [total / joined / len(self.policies) for total, joined in norms]

    def matched_alpha(self, weights: Sequence[float], like: MergeSpec) -> float:
        """Return γ, the one factor that gives Σ λ_i·τ_i the norm that the schedule of `like` gives it.

        γ² = Σ_t s_t²·‖r_t‖² / Σ_t ‖r_t‖² over the tensors t, r_t = Σ λ_i·τ_i,t and s_t the tensor's LiNeS scale; the
        norms are Euclidean. A residual of zero gets 1.
        """
        self.facts.prepare([self.facts.gram])
        scaled, plain = [], []
        for name in self._floats:
            gram = self.facts.gram(name)
            square = sum(a * b * gram[i][j] for i, a in enumerate(weights) for j, b in enumerate(weights))
            scale = tensor_scale(self.depths.place[name], like.alpha, like.beta, like.outside, name)
            plain.append(square)
            scaled.append(scale * scale * square)
        total = math.fsum(plain)
        return math.sqrt(max(0.0, math.fsum(scaled)) / total) if total > 0 else 1.0

    def tensors(self, spec: MergeSpec, order: Sequence[str] = ()) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield every merged tensor as torch's, in `order` or in the order of the base's files.

        Raises:
            UserError: a tensor of the inputs or of the result is not finite.
        """
        self.prepare([spec])
        shapes = {info.name: info for info in self.outputs()}
        for name in order or self.names:
            info = shapes[name]
            values = np.empty(info.elements, info.dtype.storage)
            nonfinite = self.nonfinite()
            share_out(list(blocks_of(info.elements)), partial(self._fill, name, spec, values, nonfinite))
            nonfinite.refuse()
            yield name, as_torch(values.reshape(info.shape), info.dtype)

    def _fill(self, name: str, spec: MergeSpec, values: Any, nonfinite: NonFinite) -> Callable[[tuple[int, int]], None]:
        workspace, step = self.workspace(), self.step(name, spec)

        def work(block: tuple[int, int]) -> None:
            start, count = block
            workspace.load(name, start, count)
            ((values[start : start + count], bad),) = workspace.merge([step])
            nonfinite.look(workspace, name, [step], [bad])

        return work

    def _gram(self, name: str, spec: MergeSpec) -> Gram:
        count = len(spec.weights)
        return tuple(row[:count] for row in self.facts.gram(name)[:count])

    def _touched(self, name: str, weights: Sequence[float]) -> bool:
        """Say whether a policy with a weight may differ from the base: adapters leave most tensors alone."""
        taken = (source for source, weight in zip(self._sources, weights, strict=False) if weight)
        return any(isinstance(source, TensorFiles) or source.touches(name) for source in taken)

    def _order(self, name: str, weights: Sequence[float]) -> list[int]:
        """Return the order in which policies are summed: theirs, not the user's, so that permuting changes nothing."""
        rows = range(len(weights))
        if len(weights) <= 2:
            return list(rows)
        digests = self.facts.digests(name)
        return sorted(rows, key=lambda i: (digests[i], weights[i]))

    def _parameters(self, name: str, spec: MergeSpec, rows: Sequence[int]) -> tuple[dict[str, Any], Masks | None]:
        """Return what a method's rule is called with beside residuals and weights."""
        row, options = METHODS[spec.method], spec.options
        taken = {key: value for key, value in options.items() if key not in ("scope", "seed")}
        if row.needs == "thresholds":
            density = float(taken.pop("density"))
            thresholds = self.facts.thresholds(name, density, str(options["scope"]))
            return {**taken, "thresholds": [thresholds[i] for i in rows]}, None
        if row.needs != "kept":
            return taken, None
        digests, seed, density = self.facts.digests(name), int(options["seed"]), float(options["density"])

        def masks(start: int, count: int) -> list[Any]:
            return [random_mask(seed, name, digests[i], density, start, count) for i in rows]

        return taken, masks

    def _output_dtype(self, name: str) -> DType:
        dtype = self.base.tensors[name].dtype
        if not dtype.floating:
            return dtype
        stored = [source.tensors[name].dtype for source in self._sources if name in source.tensors]
        return self._dtype or widest([dtype, *stored])


def plan_merge(
    base: str,
    policies: Mapping[str, str],
    *,
    dtype: str = "auto",
    device: str = "cpu",
    layers: str | None = None,
) -> MergePlan:
    """Open base and policies, check that they fit together, and find every tensor's depth.

    Args:
        base: folder or Hub id of the SFT model.
        policies: folder or Hub id of each policy, by name, in the order of the weights.
        dtype: one of `DTYPES`.
        device: "cpu", "cuda" or "cuda:1".
        layers: the block list's pattern, for layouts that are not known.

    Raises:
        UserError: with every fault of the inputs.
    """
    choose("--dtype", dtype, DTYPES)
    check_device(device)
    origin, named = open_inputs(base, policies)
    fitting = check_fit(origin, base, named)
    depths = find_depths(fitting.names, origin.config, layers)
    plan = MergePlan(origin, named, fitting.names, depths, dtype, device)
    plan.notes += [*fitting.notes, *_unplaced(depths)]
    plan.reference, plan.references, plan.layers = base, dict(policies), layers
    return plan


def _unplaced(depths: Depths) -> list[str]:
    """Return a note on tensors outside every block list that is known: a second list may be among them."""
    names = [name for name, place in depths.place.items() if place.side == "unknown"]
    if not names:
        return []
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return [f"outside the known blocks, so scaled by α: {shown}"]


def complete(spec: MergeSpec, policies: int) -> MergeSpec:
    """Return `spec` with its method's options checked and filled in.

    Raises:
        UserError: the method, an option or the number of policies is wrong.
    """
    return replace(spec, options=check_method(spec.method, spec.options, policies))


def choose(option: str, value: str, known: Sequence[str]) -> None:
    """Refuse a value that is not one of the known ones.

    Raises:
        UserError: naming them, and the nearest.
    """
    if value not in known:
        remedy = did_you_mean(value, known)
        raise fail(f"unknown value `{value}`", where=option, expected=", ".join(known), remedy=remedy)


def check_device(device: str) -> None:
    """Refuse a device that is none, or that torch cannot use.

    Raises:
        UserError: likewise.
    """
    # The processor needs no torch, which takes longer to load than a small merge.
    if device == "cpu":
        return
    import torch

    try:
        kind = torch.device(device)
    except RuntimeError as error:
        raise fail("not a device", where="--device", expected="cpu, cuda or cuda:1", got=device) from error
    if kind.type not in ("cpu", "cuda"):
        raise fail("not a device for merges", where="--device", expected="cpu, cuda or cuda:1", got=device)
    if kind.type == "cuda" and (kind.index or 0) >= torch.cuda.device_count():
        raise fail("no GPU that torch can use", where="--device", got=device, remedy="use --device cpu")

"""A merge ready to run: checkpoints that fit together, and the stream of merged tensors for any λ, α and β."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import torch

from rewarded_lines.checkpoints.layers import Depths, find_depths
from rewarded_lines.checkpoints.reader import Checkpoint, TensorInfo, open_all
from rewarded_lines.errors import fail, nearest
from rewarded_lines.merging.compatibility import check
from rewarded_lines.merging.lines import lines_scale
from rewarded_lines.merging.methods import METHODS, Method, copied_policy, merge_block

# About a million elements at a time keep the wide intermediates in cache and memory flat.
BLOCK = 1 << 20
OUTPUT_DTYPES = {
    "auto": None,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class MergeSpec:
    """The numbers of one merge: λ_i for each policy, the LiNeS schedule α, β, and the rule that joins residuals."""

    weights: tuple[float, ...]
    alpha: float = 1.0
    beta: float = 1.0
    method: str = "soup"


class MergePlan:
    """Checkpoints that have passed the pre-flight; merges them tensor by tensor, reading each input once."""

    def __init__(
        self, base: Checkpoint, policies: Mapping[str, Checkpoint], depths: Depths, dtype: str, device: str
    ) -> None:
        """Bind the inputs; use `plan_merge` to get a checked plan.

        Args:
            base: the SFT model.
            policies: by name, in the order of the weights.
            depths: the block of every tensor.
            dtype: a key of `OUTPUT_DTYPES`; "auto" gives each tensor the widest type it has in the inputs.
            device: where the arithmetic runs, "cpu" or "cuda".
        """
        self.base = base
        self.policies = policies
        self.depths = depths
        self._dtype = OUTPUT_DTYPES[dtype]
        self._device = torch.device(device)

    def outputs(self) -> list[TensorInfo]:
        """Return name, dtype and shape of every merged tensor, in the order of the base's file."""
        return [
            TensorInfo(info.name, self._output_dtype(info.name), info.shape, info.file)
            for info in self.base.tensors.values()
        ]

    def widest_dtype(self) -> str:
        """Return the name of the widest floating-point type among the merged tensors, as configs write it."""
        kinds = [info.dtype for info in self.outputs() if info.dtype.is_floating_point]
        return str(reduce(torch.promote_types, kinds, kinds[0])).removeprefix("torch.")

    def scale(self, name: str, spec: MergeSpec) -> float:
        """Return the LiNeS factor of one tensor."""
        return lines_scale(self.depths.block[name], self.depths.blocks, spec.alpha, spec.beta)

    def scales(self, spec: MergeSpec) -> list[float]:
        """Return the LiNeS factor of every block, first to last."""
        blocks = self.depths.blocks
        return [lines_scale(block, blocks, spec.alpha, spec.beta) for block in range(blocks)]

    def tensors(self, spec: MergeSpec, order: Sequence[str] = ()) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield every merged tensor, in `order` or in the order of the base's file."""
        for name in order or self.base.tensors:
            yield name, next(self.merged(name, [spec]))

    def merged(self, name: str, specs: Sequence[MergeSpec]) -> Iterator[torch.Tensor]:
        """Yield one tensor merged by each spec in turn; the inputs are read once for all."""
        base = self.base.read(name)
        policies = [policy.read(name) for policy in self.policies.values()]
        dtype = self._output_dtype(name)
        for spec in specs:
            scale = self.scale(name, spec)
            copied = copied_policy(spec.weights, scale)
            if not base.dtype.is_floating_point or all(weight * scale == 0 for weight in spec.weights):
                yield base.to(dtype)
            elif copied is not None:
                yield policies[copied].to(dtype)
            else:
                yield self._blocks(base, policies, spec, scale, dtype)

    def _blocks(
        self,
        base: torch.Tensor,
        policies: Sequence[torch.Tensor],
        spec: MergeSpec,
        scale: float,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        used = [index for index, weight in enumerate(spec.weights) if weight != 0]
        weights = [spec.weights[index] for index in used]
        method: Method = METHODS[spec.method]
        sources = [base.reshape(-1), *(policies[index].reshape(-1) for index in used)]
        out = torch.empty(base.numel(), dtype=dtype)
        for start in range(0, base.numel(), BLOCK):
            origin, *others = (source[start : start + BLOCK].to(self._device) for source in sources)
            out[start : start + BLOCK] = merge_block(origin, others, weights, scale, method, dtype)
        return out.reshape(base.shape)

    def _output_dtype(self, name: str) -> torch.dtype:
        dtype = self.base.tensors[name].dtype
        if not dtype.is_floating_point:
            return dtype
        if self._dtype is not None:
            return self._dtype
        for policy in self.policies.values():
            dtype = torch.promote_types(dtype, policy.tensors[name].dtype)
        return dtype


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
        dtype: "auto", "float32", "bfloat16" or "float16".
        device: "cpu", "cuda" or "cuda:1".
        layers: the block list's pattern, for layouts that are not known.

    Raises:
        UserError: with every fault of the inputs.
    """
    _choose("--dtype", dtype, list(OUTPUT_DTYPES))
    _check_device(device)
    opened = open_all({"base": base, **{f"policy `{name}`": path for name, path in policies.items()}})
    origin, *others = opened.values()
    named = dict(zip(policies, others, strict=True))
    check(origin, named)
    return MergePlan(origin, named, find_depths(origin.tensors, origin.config, layers), dtype, device)


def check_method(method: str) -> None:
    """Refuse a merge method that does not exist.

    Raises:
        UserError: naming those that do.
    """
    _choose("--method", method, list(METHODS))


def _choose(option: str, value: str, known: list[str]) -> None:
    if value not in known:
        alike = nearest(value, known)
        remedy = f"did you mean `{alike}`?" if alike else ""
        raise fail(f"unknown value `{value}`", where=option, expected=", ".join(known), remedy=remedy)


def _check_device(device: str) -> None:
    try:
        kind = torch.device(device)
    except RuntimeError as error:
        raise fail("not a device", where="--device", expected="cpu, cuda or cuda:1", got=device) from error
    if kind.type == "cuda" and not torch.cuda.is_available():
        raise fail("no GPU that torch can use", where="--device", got=device, remedy="use --device cpu")

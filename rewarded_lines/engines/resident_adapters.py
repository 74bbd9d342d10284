"""The factors of adapters kept in memory: a merged adapter is made there and given to vLLM without files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from rewarded_lines.checkpoints.dtypes import DType, as_torch
from rewarded_lines.checkpoints.headers import TensorInfo
from rewarded_lines.engines.vllm_versions import without_stacking
from rewarded_lines.kernels import kernels
from rewarded_lines.kernels.nonfinite import NonFinite
from rewarded_lines.kernels.torch_kernels import cast
from rewarded_lines.merger.adapter_plan import AdapterPlan
from rewarded_lines.merger.spec import MergeSpec

_Piece = tuple[int, TensorInfo, float]
"""A factor of a policy, by its index and name, and what it is multiplied by."""


class ResidentAdapters:
    """The adapters of a plan in memory, and merged adapters made from there: [γ₁·B₁ … γ_N·B_N] · [A₁; …; A_N]."""

    def __init__(self, plan: AdapterPlan, device: str | torch.device) -> None:
        """Load A and B of every module to a device.

        Raises:
            UserError: values are not finite.
        """
        assert not plan.whole.names, "vLLM serves no adapters with whole tensors"
        self._plan = plan.without_repeats()
        self._factors: dict[tuple[int, str], torch.Tensor] = {}
        nonfinite, names = plan.whole.nonfinite(), list(plan.policies)
        pairs = ((index, one) for modules in plan.modules.values() for index, one in modules.items())
        for index, info in ((index, info) for index, one in pairs for info in (one.a, one.b)):
            values = plan.adapters[index].read(info.name)
            nonfinite.add(info.name, f"policy `{names[index]}`", int(kernels.count_nonfinite(values)))
            self._factors[index, info.name] = as_torch(values, info.dtype).view(info.shape).to(device)
        nonfinite.refuse()

    def tensors(self, spec: MergeSpec) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the tensors of a merged adapter with their names in its file, and the bits that `merge` writes.

        Raises:
            UserError: values are not finite; raised after the last tensor.
        """
        output, nonfinite = self._plan.output(spec), self._plan.whole.nonfinite()
        for name, stack in output.stacks.items():
            owners = [(part, self._plan.modules[name][part.policy]) for part in stack.parts]
            above = ((part.policy, module.a, 1.0) for part, module in owners)
            beside = ((part.policy, module.b, part.factor) for part, module in owners)
            yield stack.key("A"), self._joined(above, 0, output.dtype, nonfinite)
            yield stack.key("B"), self._joined(beside, 1, output.dtype, nonfinite)
        nonfinite.refuse()

    def _joined(self, pieces: Iterable[_Piece], axis: int, dtype: DType, nonfinite: NonFinite) -> torch.Tensor:
        """Return factors along an axis, each multiplied in float64 and rounded once."""
        kind, made = getattr(torch, dtype.torch), []
        for policy, info, factor in pieces:
            values = self._factors[policy, info.name]
            if factor != 1 or values.dtype != kind:
                values, bad = cast(values.to(torch.float64) * factor, kind)
                nonfinite.add(info.name, "the result", bad)
            made.append(values)
        return torch.cat(made, axis)


def as_vllm_adapter(loader: Any, number: int, tensors: Iterable[tuple[str, torch.Tensor]]) -> Any:
    """Return a merged adapter in vLLM's form, under a number.

    Where layers are spread over devices, vLLM takes each worker's part. `tensors` are those in the file of an adapter
    whose α is its rank; `loader` is vLLM's `WorkerLoRAManager`.
    """
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper

    model, config = loader._adapter_manager.model, loader.lora_config
    values = {name: tensor.to(config.lora_dtype) for name, tensor in tensors}
    rank = max(len(tensor) for name, tensor in values.items() if ".lora_A." in name)
    helper = PEFTHelper(r=rank, lora_alpha=rank, target_modules=[])
    helper.validate_legal(config)
    return LoRAModel.from_lora_tensors(
        number,
        values,
        helper,
        device=str(next(iter(values.values())).device),
        dtype=config.lora_dtype,
        weights_mapper=without_stacking(getattr(model, "hf_to_vllm_mapper", None)),
        skip_prefixes=getattr(model, "lora_skip_prefixes", None),
    )


def give_to_vllm(runner: Any, number: int, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Put a merged adapter into a slot of vLLM, under a new number; see `as_vllm_adapter`.

    vLLM itself registers the adapters of its trial runs in this way: requests with that number then find it loaded and
    never look for files.
    """
    loader = runner.lora_manager
    manager, adapter = loader._adapter_manager, as_vllm_adapter(loader, number, tensors)
    manager.add_adapter(adapter)
    manager.activate_adapter(number)
    if loader.device.type == "cuda":
        # The slot is whole before anybody reads it, on whichever stream.
        torch.cuda.synchronize(loader.device)
    # The slot has the values. vLLM would copy these into another slot if that one were taken: it must fail instead.
    for layer in adapter.loras.values():
        layer.lora_a, layer.lora_b = _without_values(layer.lora_a), _without_values(layer.lora_b)


def _without_values(factor: Any) -> Any:
    """Return a factor, or those of fused layers, as tensors that take no memory."""
    if isinstance(factor, torch.Tensor):
        return torch.empty_like(factor, device="meta")
    return factor and [_without_values(one) for one in factor]

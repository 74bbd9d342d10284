"""vLLM with merged LoRA adapters over one base: requests of many models share a batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from rewarded_lines.checkpoints.families import TIED_HEADS
from rewarded_lines.engines.adapter_folders import AdapterFolders, AdapterGenerator, adapted_layers, adapter_bytes
from rewarded_lines.engines.base import Workload
from rewarded_lines.engines.vllm_core import VllmCore
from rewarded_lines.engines.vllm_memory import adapters_at_once
from rewarded_lines.engines.vllm_process import vllm_device
from rewarded_lines.errors import fail
from rewarded_lines.merger.adapter_plan import AdapterPlan
from rewarded_lines.merger.adapter_settings import VLLM_RANKS, served_rank
from rewarded_lines.processes import available_memory

_FEW_AT_ONCE = 4
_ENGINE = "--engine vllm"
_REMEDY = "use --engine hf, which folds adapters into their base"


class VllmAdapterGenerator(VllmCore, AdapterGenerator):
    """Merged adapters are written to memory or a temporary folder and loaded into slots of the engine.

    One slot stays spare: with none free, vLLM applies the last adapter to requests without an adapter.
    """

    def __init__(self, work: Workload) -> None:
        """Start the engine; see `load_generator`.

        Raises:
            UserError: vLLM cannot serve such adapters.
        """
        self._plan = plan = cast(AdapterPlan, work.plan)
        refuse_unserved(plan)
        rank = slot_rank(plan)
        free = available_memory(vllm_device())
        self.at_once = adapters_at_once(free, adapter_bytes(plan, rank))
        self._number = 0
        self._start(
            work,
            enable_lora=True,
            max_lora_rank=rank,
            max_loras=self.at_once + 1,
            max_cpu_loras=self.at_once + 1,
            # If the head is a target, vLLM fails to score prompts, even for adapters that leave it alone.
            lora_target_modules=adapted_layers(plan),
        )
        # A kill loses the work of one call: if models do not share a batch anyway, a call gets few of them.
        worth = self._worth_mixing(len(work.prompts) * work.spec.n)
        self.at_once = min(self.at_once, max(_FEW_AT_ONCE, worth))
        self.call("group_adapters")
        self._folders = AdapterFolders(plan)

    def close(self) -> None:
        """See `Generator.close`."""
        if self._folders:
            self._folders.close()
        super().close()

    def _worth_mixing(self, requests: int) -> int:
        """Return how many adapters fill vLLM's batch. On a CPU, more adapters in a batch make it slower."""
        if vllm_device() == "cuda":
            return self.at_once
        most: int = self._llm.llm_engine.vllm_config.scheduler_config.max_num_seqs
        return max(1, most // max(1, requests))

    def _load(self, folder: Path) -> Any:
        from vllm.lora.request import LoRARequest

        self._number += 1
        # vLLM finds cached prefixes by the adapter's number and name, so both are new every time.
        request = LoRARequest(str(self._number), self._number, str(folder))
        try:
            self._llm.llm_engine.add_lora(request)
            unserved = self.call("unserved_modules", self._number)[0]
        except Exception as error:  # noqa: BLE001 - the user can fold an adapter, whatever vLLM's reason is
            what = "vLLM does not take the merged adapters"
            raise fail(what, where=_ENGINE, got=str(error), remedy=_REMEDY) from error
        if unserved:
            what, got = "vLLM leaves out modules of the adapters", ", ".join(unserved[:3])
            raise fail(what, where=_ENGINE, got=got, remedy=_REMEDY)
        return request

    def _unload(self, name: Any) -> None:
        self._llm.llm_engine.remove_lora(name.lora_int_id)


def refuse_unserved(plan: AdapterPlan, where: str = _ENGINE) -> None:
    """Refuse adapters that vLLM does not serve: those of other than linear layers. `where`: the engine."""
    embeddings = [name for name, modules in plan.modules.items() if next(iter(modules.values())).embedding]
    experts = [name for name, modules in plan.modules.items() if next(iter(modules.values())).experts > 1]
    heads = [name for name in plan.modules if f"{name}.weight" in TIED_HEADS]
    for what, names in (
        ("tensors that are saved whole (modules_to_save, biases)", list(plan.whole.names)),
        ("adapters of embeddings", embeddings),
        ("adapters of the head", heads),
        ("merged adapters of fused experts (target_parameters)", experts),
    ):
        if names:
            raise fail(f"vLLM serves no {what}", where=where, got=", ".join(names[:3]), remedy=_REMEDY)


def slot_rank(plan: AdapterPlan, where: str = _ENGINE) -> int:
    """Return the max_lora_rank that merged adapters need, at least Σ rᵢ of every module. `where`: the engine."""
    rank = max(sum(one.rank for one in modules.values()) for modules in plan.modules.values())
    if rank > VLLM_RANKS[-1]:
        raise fail(
            "merged adapters have the sum of their policies' ranks, which is more than vLLM serves",
            where=where,
            expected=f"at most {VLLM_RANKS[-1]}",
            got=str(rank),
            remedy=_REMEDY,
        )
    return served_rank(rank)

"""vLLM with merged LoRA adapters over one base: requests of many models share a batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from rewarded_lines.checkpoints.dtypes import FLOATS
from rewarded_lines.checkpoints.families import TIED_HEADS
from rewarded_lines.checkpoints.reader import total_bytes
from rewarded_lines.engines.adapter_folders import AdapterFolders, AdapterGenerator, adapted_layers, adapter_bytes
from rewarded_lines.engines.base import Workload
from rewarded_lines.engines.vllm_core import VllmCore
from rewarded_lines.engines.vllm_memory import adapters_at_once, beside_for_adapters
from rewarded_lines.engines.vllm_models import plan_message, spec_message
from rewarded_lines.engines.vllm_process import vllm_device
from rewarded_lines.errors import UserError, fail
from rewarded_lines.merger.adapter_plan import AdapterPlan
from rewarded_lines.merger.adapter_settings import VLLM_RANKS, served_rank
from rewarded_lines.merger.spec import MergeSpec
from rewarded_lines.out_of_memory import tell
from rewarded_lines.processes import available_memory

_FEW_AT_ONCE = 4
_ENGINE = "--engine vllm"
_REMEDY = "use --engine hf, which folds adapters into their base"


class VllmAdapterGenerator(VllmCore, AdapterGenerator):
    """Merged adapters go into slots of the engine.

    The workers keep the policies' factors on the GPU, or in the host's memory, and make merged adapters there. With
    `resident: disk`, and where that fails, they are files in memory or a temporary folder.

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
        # The factors, and one merged adapter on its way to a slot.
        inputs = sum(total_bytes(one.tensors.values()) for one in plan.adapters)
        inputs += adapter_bytes(plan, itemsize=FLOATS[work.spec.dtype].itemsize)
        asked, card = work.settings.resident, free - work.spare if vllm_device() == "cuda" else 0
        beside = beside_for_adapters(asked, inputs, card)
        if asked == "gpu" and not beside:
            self.told = ("resident: no room for the adapters on a GPU; they wait in the host's memory",)
        self._start(
            work,
            beside=beside,
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
        try:
            if asked == "disk":
                self._folders = AdapterFolders(plan)
            elif reason := self.ask("hold_factors", plan_message(plan), beside > 0):
                self._use_files(reason)
        except BaseException:
            self.close()
            raise

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

    def _load(self, source: Any) -> Any:
        from vllm.lora.request import LoRARequest

        self._number += 1
        with _taken():
            if self._folders is None and (reason := self.ask("add_merged", self._number, spec_message(source))):
                self._llm.llm_engine.remove_lora(self._number)
                self._use_files(reason)
            if self._folders and isinstance(source, MergeSpec):
                # Memory did for the adapters before this one.
                (source,) = self._folders.write([source])
            # vLLM finds cached prefixes by the adapter's number and name, so both are new every time.
            request = LoRARequest(str(self._number), self._number, str(source))
            if self._folders:
                self._llm.llm_engine.add_lora(request)
            unserved = self.call("unserved_modules", self._number)[0]
        if unserved:
            what, got = "vLLM leaves out modules of the adapters", ", ".join(unserved[:3])
            raise fail(what, where=_ENGINE, got=got, remedy=_REMEDY)
        return request

    def _use_files(self, reason: str) -> None:
        assert self._plan is not None
        tell(f"resident: merged adapters go through files from now on ({reason.splitlines()[0][:120]})")
        self._folders = AdapterFolders(self._plan)

    def _unload(self, name: Any) -> None:
        self._llm.llm_engine.remove_lora(name.lora_int_id)


@contextmanager
def _taken() -> Iterator[None]:
    """Refuse adapters with which vLLM fails in the block: the user can fold them, whatever the reason is."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        what = "vLLM does not take the merged adapters"
        raise fail(what, where=_ENGINE, got=str(error), remedy=_REMEDY) from error


def refuse_unserved(plan: AdapterPlan, where: str = _ENGINE, remedy: str = _REMEDY) -> None:
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
            raise fail(f"vLLM serves no {what}", where=where, got=", ".join(names[:3]), remedy=remedy)


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

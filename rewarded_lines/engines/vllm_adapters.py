"""vLLM with merged LoRA adapters over one base: requests of many models share a batch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast

from rewarded_lines.checkpoints.families import TIED_HEADS
from rewarded_lines.config import GenerationSpec
from rewarded_lines.data.prompts import Prompt
from rewarded_lines.engines.adapter_folders import (
    AdapterFolders,
    adapted_layers,
    adapter_bytes,
    changes_nothing,
    largest_rank,
)
from rewarded_lines.engines.base import Model, Response, Tokens, Workload
from rewarded_lines.engines.vllm_core import VllmCore
from rewarded_lines.errors import fail
from rewarded_lines.merger.adapter_plan import AdapterPlan

# What vLLM's max_lora_rank can be.
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_MOST_AT_ONCE = 16
_FEW_AT_ONCE = 4
# Slots for adapters may take this part of the memory that is free.
_SHARE = 0.1
_REMEDY = "use --engine hf, which folds adapters into their base"


class VllmAdapterGenerator:
    """Merged adapters are written to memory or a temporary folder, loaded into slots of the engine, and dropped.

    One slot stays spare: with none free, vLLM applies the last adapter to requests without an adapter.

    Attributes:
        at_once: how many adapters fit into the slots; more models than that are answered in turn.
    """

    def __init__(self, work: Workload) -> None:
        """Start the engine; see `load_generator`.

        Raises:
            UserError: vLLM cannot serve such adapters.
        """
        self._plan = plan = cast(AdapterPlan, work.plan)
        refuse_unserved(plan)
        rank = slot_rank(plan)
        self.at_once = min(_MOST_AT_ONCE, max(1, int(_SHARE * _free_memory() / adapter_bytes(plan, rank))))
        self._loaded = 0
        self._core = VllmCore(
            work,
            enable_lora=True,
            max_lora_rank=rank,
            max_loras=self.at_once + 1,
            max_cpu_loras=self.at_once + 1,
            # With an adapted head, vLLM fails to score prompts, also for models that leave the head alone.
            lora_target_modules=adapted_layers(plan),
        )
        # A kill loses the work of one call: if models do not share a batch anyway, a call gets few of them.
        self.at_once = min(self.at_once, max(_FEW_AT_ONCE, self._worth_mixing(len(work.prompts) * work.spec.n)))
        self._folders = AdapterFolders(plan)

    @property
    def swap_seconds(self) -> float:
        """See `Generator`."""
        return self._folders.seconds

    def encode(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """See `Generator.encode`."""
        return self._core.encode(prompts)

    def generate(
        self, prompts: Sequence[Prompt], spec: GenerationSpec, models: Sequence[Model] = (None,)
    ) -> list[list[Response]]:
        """See `Generator.generate`."""
        answers: list[list[Response]] = []
        for chunk in chunks(self._plan, models, min(self.at_once, self._worth_mixing(len(prompts) * spec.n))):
            with self._adapters(chunk) as adapters:
                answers += self._core.generate(prompts, spec, adapters)
        return answers

    def logprobs(self, pairs: Sequence[tuple[Tokens, Tokens]], model: Model = None) -> list[float]:
        """See `Generator.logprobs`."""
        with self._adapters([model]) as adapters:
            return self._core.logprobs(pairs, adapters[0])

    def close(self) -> None:
        """See `Generator.close`."""
        self._folders.close()
        self._core.close()

    def _worth_mixing(self, requests: int) -> int:
        """Return how many adapters fill vLLM's batch. On a CPU, mixing more of them costs more than it saves."""
        import torch

        if torch.cuda.is_available():
            return self.at_once
        most: int = self._core.engine.vllm_config.scheduler_config.max_num_seqs
        return max(1, most // max(1, requests))

    def _adapters(self, models: Sequence[Model]) -> AbstractContextManager[list[Any]]:
        """Yield a request for each model's adapter, None for the base."""
        return self._folders.loaded(
            models, self._load, lambda request: self._core.engine.remove_lora(request.lora_int_id)
        )

    def _load(self, folder: Path) -> Any:
        """Load an adapter into the engine.

        Raises:
            UserError: it has modules that vLLM does not serve.
        """
        from vllm.lora.request import LoRARequest

        self._loaded += 1
        # vLLM finds cached prefixes by the adapter's number and name, so both are new every time.
        request = LoRARequest(str(self._loaded), self._loaded, str(folder))
        try:
            self._core.engine.add_lora(request)
            unserved = self._core.call("unserved_modules", self._loaded)[0]
        except Exception as error:  # noqa: BLE001 - the user can fold an adapter, whatever vLLM's reason is
            raise fail(
                "vLLM does not take the merged adapters", where="--engine vllm", got=str(error), remedy=_REMEDY
            ) from error
        if unserved:
            got = ", ".join(unserved[:3])
            raise fail("vLLM leaves out modules of the adapters", where="--engine vllm", got=got, remedy=_REMEDY)
        return request


def refuse_unserved(plan: AdapterPlan, where: str = "--engine vllm") -> None:
    """Refuse adapters that hold more than factors of linear layers: vLLM serves nothing else.

    Raises:
        UserError: it names the tensors; `where` is the engine.
    """
    embeddings = [name for name, modules in plan.modules.items() if next(iter(modules.values())).embedding]
    heads = [name for name in plan.modules if f"{name}.weight" in TIED_HEADS]
    for what, names in (
        ("tensors that are saved whole (modules_to_save, biases)", list(plan.whole.names)),
        ("adapters of embeddings", embeddings),
        ("adapters of the head", heads),
    ):
        if names:
            got = ", ".join(names[:3])
            raise fail(f"vLLM serves no {what}", where=where, got=got, remedy=_REMEDY)


def slot_rank(plan: AdapterPlan, where: str = "--engine vllm") -> int:
    """Return the max_lora_rank that merged adapters need.

    Raises:
        UserError: the rank is too large for vLLM; `where` is the engine.
    """
    rank = largest_rank(plan)
    if rank > RANKS[-1]:
        raise fail(
            "merged adapters have the sum of their policies' ranks, which is more than vLLM serves",
            where=where,
            expected=f"at most {RANKS[-1]}",
            got=str(rank),
            remedy=_REMEDY,
        )
    return next(allowed for allowed in RANKS if allowed >= rank)


def chunks(plan: AdapterPlan, models: Sequence[Model], at_once: int) -> Iterator[list[Model]]:
    """Yield the models in order, in chunks with at most `at_once` adapters."""
    chunk: list[Model] = []
    adapters = 0
    for model in models:
        one = int(model is not None and not changes_nothing(plan, model))
        if adapters + one > at_once:
            yield chunk
            chunk, adapters = [], 0
        chunk.append(model)
        adapters += one
    if chunk:
        yield chunk


def _free_memory() -> int:
    """Return the free bytes of the GPU, or of the machine without one."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

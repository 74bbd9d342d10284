"""Methods for vLLM's workers: merge into the running model, check a loaded adapter.

A worker runs in the process of the engine's owner, or in one of several processes that each hold a part of the model.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from rewarded_lines.engines.base import base_spec
from rewarded_lines.engines.cpu_adapters import group_adapters
from rewarded_lines.engines.vllm_models import PLANS
from rewarded_lines.errors import UserError
from rewarded_lines.merger.open_inputs import plan_merge
from rewarded_lines.merger.spec import MergeSpec


class MergingWorker:
    """An extension of vLLM's worker. The engine calls its methods by name on every worker."""

    def open_plan(self, message: Mapping[str, Any]) -> None:
        """Get ready to merge; see `plan_message`."""
        if message["process"] == os.getpid():
            plan = PLANS[message["key"]]
        else:
            assert message["base"], "only a plan from plan_merge can be opened again"
            plan = plan_merge(message["base"], message["policies"], dtype=message["dtype"], layers=message["layers"])
        self.merge_plan = plan
        # Merging the smallest tensor loads the kernels before the first swap.
        smallest = min(plan.outputs(), key=lambda info: info.elements).name
        for _ in plan.tensors(base_spec(plan), [smallest]):
            pass

    def use_merge(self, message: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Stream a merge's tensors into the running model; the message has the fields of its `MergeSpec`.

        Returns:
            The problems of a `UserError`: vLLM cannot send the error itself from process to process.
        """
        spec = MergeSpec(**{**message, "weights": tuple(message["weights"])})
        worker: Any = self
        try:
            worker.reload_weights(weights_iterator=self.merge_plan.tensors(spec))
            _repack_tied_head(worker.get_model())
        except UserError as error:
            return [asdict(problem) for problem in error.problems]
        return []

    def shared_memory_name(self) -> str:
        """Return the prefix of the names in /dev/shm that several CPU workers share; "" on a GPU."""
        return os.environ.get("VLLM_DIST_IDENT", "")

    def group_adapters(self) -> None:
        """Make adapters fast where vLLM has no kernels for them; see `cpu_adapters`."""
        worker: Any = self
        if worker.device.type == "cpu":
            group_adapters()

    def unserved_modules(self, adapter: int) -> list[str]:
        """Return the modules of a loaded adapter that the model does not have: vLLM silently ignores them."""
        worker: Any = self
        manager = worker.model_runner.lora_manager._adapter_manager
        return sorted(set(manager.get_adapter(adapter).loras) - set(manager.modules))


def _repack_tied_head(model: Any) -> None:
    """Update a tied head on a CPU.

    vLLM keeps a packed copy of the head's weight there. A reload packs only the tensors that it loads, and a tied head
    is not among them: without this call the head would keep the old embeddings.
    """
    head: Any = getattr(model, "lm_head", None)
    if hasattr(head, "cpu_linear") and getattr(model.config, "tie_word_embeddings", False):
        head.quant_method.process_weights_after_loading(head)

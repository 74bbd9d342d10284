"""The methods that this package adds to vLLM's workers: merge into the running model, check a loaded adapter.

A worker runs in the process of the engine's owner, or in one of several processes that each hold a part of the model.
"""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from rewarded_lines.engines.cpu_adapters import group_adapters
from rewarded_lines.errors import UserError
from rewarded_lines.merger.model_plan import ModelPlan
from rewarded_lines.merger.open_inputs import plan_merge
from rewarded_lines.merger.spec import MergeSpec

# Plans of this process: its own workers use them as they are, with their measurements.
_plans: weakref.WeakValueDictionary[int, ModelPlan] = weakref.WeakValueDictionary()


def plan_message(plan: ModelPlan) -> dict[str, Any]:
    """Return in plain types what a worker needs to find a plan, or to open it again."""
    _plans[id(plan)] = plan
    return {
        "process": os.getpid(),
        "key": id(plan),
        "base": plan.reference,
        "policies": dict(plan.references),
        "dtype": plan.dtype_name,
        "layers": plan.layers,
    }


def spec_message(spec: MergeSpec) -> dict[str, Any]:
    """Return the numbers of a merge in plain types."""
    return {**asdict(spec), "weights": list(spec.weights), "options": dict(spec.options)}


class MergingWorker:
    """An extension of vLLM's worker. The engine calls its methods by name on every worker."""

    def open_plan(self, message: Mapping[str, Any]) -> None:
        """Get ready to merge; see `plan_message`."""
        if message["process"] == os.getpid():
            self.merge_plan = _plans[message["key"]]
        else:
            assert message["base"], "a plan that was not made by plan_merge cannot be opened again"
            self.merge_plan = plan_merge(
                message["base"], message["policies"], dtype=message["dtype"], layers=message["layers"]
            )
        self._load_kernels()

    def use_merge(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Stream a merge's tensors into the running model; see `spec_message`.

        Returns:
            The seconds it took, and the problems of a `UserError`, which cannot travel between processes itself.
        """
        started = time.perf_counter()
        spec = MergeSpec(**{**message, "weights": tuple(message["weights"])})
        problems: list[dict[str, Any]] = []
        worker: Any = self
        try:
            worker.reload_weights(weights_iterator=self.merge_plan.tensors(spec))
            _repack_tied_head(worker.get_model())
        except UserError as error:
            problems = [asdict(problem) for problem in error.problems]
        return {"seconds": time.perf_counter() - started, "problems": problems}

    def _load_kernels(self) -> None:
        """Merge the smallest tensor: this loads the kernels before the first swap."""
        plan = self.merge_plan
        smallest = min(plan.outputs(), key=lambda info: info.elements).name
        for _ in plan.tensors(MergeSpec((0.0,) * len(plan.policies), 0.0, 0.0), [smallest]):
            pass

    def shared_memory_name(self) -> str:
        """Return the prefix of the names in /dev/shm that several CPU workers share; "" on a GPU."""
        return os.environ.get("VLLM_DIST_IDENT", "")

    def group_adapters(self) -> None:
        """Make adapters fast where vLLM has no kernels for them; see `cpu_adapters`."""
        worker: Any = self
        if worker.device.type == "cpu":
            group_adapters()

    def unserved_modules(self, adapter: int) -> list[str]:
        """Return the modules of a loaded adapter that vLLM ignores without a word: no layer of the model has them."""
        worker: Any = self
        manager = worker.model_runner.lora_manager._adapter_manager
        return sorted(set(manager.get_adapter(adapter).loras) - set(manager.modules))


def _repack_tied_head(model: Any) -> None:
    """Update a tied head on a CPU.

    There vLLM keeps a packed copy of the head's weight. A reload packs only the tensors it loads, and a tied head is
    not among them: without this call the head would keep the old embeddings.
    """
    head: Any = getattr(model, "lm_head", None)
    if hasattr(head, "cpu_linear") and getattr(model.config, "tie_word_embeddings", False):
        head.quant_method.process_weights_after_loading(head)

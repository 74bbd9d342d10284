"""vLLM with whole merged models: the engine starts once, merged weights stream into it."""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rewarded_lines.config import GenerationSpec
from rewarded_lines.data.prompts import Prompt
from rewarded_lines.engines.base import Pairs, Response, SwappingGenerator, Workload
from rewarded_lines.engines.vllm_core import VllmCore
from rewarded_lines.errors import Problem, UserError
from rewarded_lines.merger.model_plan import ModelPlan
from rewarded_lines.merger.spec import MergeSpec

PLANS: weakref.WeakValueDictionary[int, ModelPlan] = weakref.WeakValueDictionary()
"""Plans that workers in this process use as they are, with their measurements."""


class VllmGenerator(SwappingGenerator):
    """Every process that holds a part of the model merges that part itself."""

    def __init__(self, work: Workload) -> None:
        """Start the engine; see `load_generator`."""
        super().__init__(work)
        self._core = VllmCore(work)
        if self._plan is not None:
            try:
                self._core.call("open_plan", plan_message(self._plan))
            except BaseException:
                self.close()
                raise

    def encode(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """See `Generator.encode`."""
        return self._core.encode(prompts)

    def close(self) -> None:
        """See `Generator.close`."""
        self._core.close()

    def _generate(self, prompts: Sequence[Prompt], spec: GenerationSpec, loaded: Sequence[Any]) -> list[list[Response]]:
        return self._core.generate(prompts, spec)

    def _logprobs(self, pairs: Pairs, loaded: Any) -> list[float]:
        return self._core.logprobs(pairs)

    def _swap(self, spec: MergeSpec) -> None:
        message = {**asdict(spec), "weights": list(spec.weights), "options": dict(spec.options)}
        if problems := self._core.call("use_merge", message)[0]:
            raise UserError(Problem(**problem) for problem in problems)


def plan_message(plan: ModelPlan) -> dict[str, Any]:
    """Return in plain types what a worker needs to find a plan, or to open it again."""
    PLANS[id(plan)] = plan
    return {
        "process": os.getpid(),
        "key": id(plan),
        "base": plan.reference,
        "policies": dict(plan.references),
        "dtype": plan.dtype_name,
        "layers": plan.layers,
    }

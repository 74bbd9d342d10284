"""vLLM with whole merged models: the engine is started once, merged weights stream into it layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, cast

from rewarded_lines.config import GenerationSpec
from rewarded_lines.data.prompts import Prompt
from rewarded_lines.engines.base import Model, Response, Tokens, Workload
from rewarded_lines.engines.vllm_core import VllmCore
from rewarded_lines.engines.vllm_worker import plan_message, spec_message
from rewarded_lines.errors import Problem, UserError
from rewarded_lines.merger.model_plan import ModelPlan
from rewarded_lines.merger.spec import MergeSpec

_HALF_WRITTEN: Final = "half-written"


class VllmGenerator:
    """Every process that holds a part of the model merges that part itself."""

    at_once = 1

    def __init__(self, work: Workload) -> None:
        """Start the engine; see `load_generator`."""
        self.swap_seconds = 0.0
        self._plan = cast(ModelPlan | None, work.plan)
        self._in_use: Model | str = None
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

    def generate(
        self, prompts: Sequence[Prompt], spec: GenerationSpec, models: Sequence[Model] = (None,)
    ) -> list[list[Response]]:
        """See `Generator.generate`."""
        answers = []
        for model in models:
            self._use(model)
            answers += self._core.generate(prompts, spec)
        return answers

    def logprobs(self, pairs: Sequence[tuple[Tokens, Tokens]], model: Model = None) -> list[float]:
        """See `Generator.logprobs`."""
        self._use(model)
        return self._core.logprobs(pairs)

    def close(self) -> None:
        """See `Generator.close`."""
        self._core.close()

    def _use(self, model: Model) -> None:
        """Load a merge's weights into the engine, unless it has them already.

        Raises:
            UserError: a tensor of the inputs or of the merge is not finite.
        """
        if model == self._in_use:
            return
        assert self._plan is not None, "without a plan there is only the SFT model"
        self._in_use = _HALF_WRITTEN
        base = MergeSpec((0.0,) * len(self._plan.policies), 0.0, 0.0)
        results = self._core.call("use_merge", spec_message(base if model is None else model))
        if problems := results[0]["problems"]:
            raise UserError(Problem(**problem) for problem in problems)
        self._core.forget()
        self._in_use = model
        self.swap_seconds += max(one["seconds"] for one in results)

"""What an engine is: it answers prompts as the SFT model or as any merge of a plan."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, cast

from rewarded_lines.config import GenerationSpec
from rewarded_lines.data.prompts import Prompt, encode
from rewarded_lines.engine_settings import EngineSettings
from rewarded_lines.merger.model_plan import ModelPlan
from rewarded_lines.merger.plan import Plan
from rewarded_lines.merger.spec import MergeSpec
from rewarded_lines.trace import span

Tokens = Sequence[int]
Pairs = Sequence[tuple[Tokens, Tokens]]
"""Heads and tails: a prompt's tokens and those of a response, for example. No head is empty."""
Model = MergeSpec | None
"""Who answers: a merge of the engine's plan, or None for the SFT model."""
# Different runs, prompts and samples never share a seed.
_SEED_STRIDE = 1_000_000
# Samples also differ in the low 32 bits: torch's CPU generator reads no others.
_SAMPLE_STRIDE = (1 << 42) + 2_654_435_761


@dataclass(frozen=True)
class Response:
    """One answer.

    Attributes:
        text: without special tokens.
        tokens: ids, the end token included.
        ended: whether it ended before `max_tokens`.
        logprob: Σ_t log π(y_t | x, y_<t) in nats at temperature 1, the end token included.
        seen: the part of the text that rewards, length and audits see, if `strip:` hides the rest.
    """

    text: str
    tokens: tuple[int, ...]
    ended: bool
    logprob: float
    seen: str | None = None

    @property
    def judged(self) -> str:
        """The text that rewards, length and audits see."""
        return self.text if self.seen is None else self.seen


@dataclass(frozen=True)
class Workload:
    """What an engine is started for.

    Attributes:
        model: the SFT model's folder or Hub id.
        spec: dtype, chat template and response length.
        prompts: the longest prompt decides the longest sequence.
        plan: what merges are made of; without a plan only the SFT model answers.
        longest: tokens of the longest sequence that `logprobs` gets.
        settings: how vLLM starts; other engines take none.
        spare: bytes of each GPU that must stay free for reward models.
        engines: at most so many start on this machine and share its memory.
        models: so many must fit into memory at once, for mixtures while decoding.
    """

    model: str
    spec: GenerationSpec
    prompts: Sequence[Prompt]
    plan: Plan | None = None
    longest: int = 0
    settings: EngineSettings = EngineSettings()
    spare: int = 0
    engines: int = 1
    models: int = 1

    @property
    def texts(self) -> str:
        """The folder or Hub id with the tokenizer and the end tokens: those that the merged outputs get."""
        if self.plan is None or not self.plan.carried.changed:
            return self.model
        return str(self.plan.text_folder)


class Generator(ABC):
    """An engine over one SFT model. Each response has its own seed and does not depend on the other prompts.

    Attributes:
        at_once: how many models one call of `generate` should get: more than 1 if models share a batch.
        swap_seconds: time spent so far on putting merged weights or adapters into the engine.
        told: what the user should know about how it was started.
    """

    at_once: int = 1
    swap_seconds: float = 0.0
    told: Sequence[str] = ()
    _tokenizer: Any
    _ends: frozenset[int]

    def encode(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Return the tokens that the model gets for each prompt."""
        return encode(self._tokenizer, prompts)

    def generate(
        self, prompts: Sequence[Prompt], spec: GenerationSpec, models: Sequence[Model] = (None,)
    ) -> list[list[Response]]:
        """Return for each model `spec.n` responses to each prompt, those of one prompt next to each other.

        Response k to prompt i has the seed `prompt_seed(spec, i, k)` under every model.
        """
        answers: list[list[Response]] = []
        for chunk in self._chunks(models, len(prompts) * spec.n):
            with self._loaded(chunk) as loaded:
                answers += self._generate(prompts, spec, loaded)
        return answers

    def logprobs(self, pairs: Pairs, model: Model = None) -> list[float]:
        """Return log π(tail | head) in nats at temperature 1 for each pair."""
        with self._loaded([model]) as (loaded,):
            return self._logprobs(pairs, loaded)

    @abstractmethod
    def close(self) -> None:
        """Free the engine, its memory and its processes."""

    def _chunks(self, models: Sequence[Model], requests: int) -> Iterator[list[Model]]:
        """Yield the models in order, in groups that share a batch of `requests` for each model."""
        return ([model] for model in models)

    @abstractmethod
    def _loaded(self, models: Sequence[Model]) -> AbstractContextManager[list[Any]]:
        """Hold models in the engine for the block; yield its name for each, None for the base."""

    @abstractmethod
    def _generate(
        self, prompts: Sequence[Prompt], spec: GenerationSpec, loaded: Sequence[Any]
    ) -> list[list[Response]]: ...

    @abstractmethod
    def _logprobs(self, pairs: Pairs, loaded: Any) -> list[float]: ...


class SwappingGenerator(Generator):
    """An engine that holds the weights of one model and replaces them in place."""

    def __init__(self, work: Workload) -> None:
        """Start with the SFT model's weights; a plan must be one of whole models."""
        self._plan = cast(ModelPlan | None, work.plan)
        self._in_use: Model | str = None

    @contextmanager
    def _loaded(self, models: Sequence[Model]) -> Iterator[list[Any]]:
        (model,) = models
        if model != self._in_use:
            assert self._plan is not None, "without a plan there is only the SFT model"
            started = time.perf_counter()
            self._in_use = "half-written"
            with span("swap weights"):
                self._swap(base_spec(self._plan) if model is None else model)
            self._in_use = model
            self.swap_seconds += time.perf_counter() - started
        yield [None]

    @abstractmethod
    def _swap(self, spec: MergeSpec) -> None:
        """Write a merge's weights into the engine.

        Raises:
            UserError: a tensor is not finite, or the engine has no place for it.
        """


def base_spec(plan: Plan) -> MergeSpec:
    """Return the merge that is the SFT model."""
    return MergeSpec((0.0,) * len(plan.policies), 0.0, 0.0)


def prompt_seed(spec: GenerationSpec, index: int, sample: int = 0) -> int:
    """Return the seed of a response to prompt `index`, the same at every point of a sweep."""
    return spec.seed * _SEED_STRIDE + index + sample * _SAMPLE_STRIDE


def seeded_rows(ids: Sequence[list[int]], spec: GenerationSpec) -> list[tuple[list[int], int]]:
    """Return the tokens and the seed of each response: `spec.n` for each prompt."""
    return [(row, prompt_seed(spec, index, k)) for index, row in enumerate(ids) for k in range(spec.n)]

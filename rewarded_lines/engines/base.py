"""What an engine is: it answers prompts as the SFT model or as any merge of a plan. No engine is started here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from rewarded_lines.config import GenerationSpec
from rewarded_lines.data.prompts import Prompt
from rewarded_lines.merger.plan import Plan
from rewarded_lines.merger.spec import MergeSpec

Tokens = Sequence[int]
Model = MergeSpec | None
"""Who answers: a merge of the engine's plan, or None for the SFT model itself."""
# Different runs, prompts and samples never share a seed.
_SEED_STRIDE = 1_000_000
# Samples differ in the low 32 bits, too: torch's generator on a CPU reads no others.
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
        prompts: the longest of them decides how long a sequence can get.
        plan: what merges are made of; without a plan the engine answers as the SFT model only.
        longest: tokens of the longest sequence that `logprobs` will be asked for.
        tensor_parallel: over how many devices vLLM spreads the model.
    """

    model: str
    spec: GenerationSpec
    prompts: Sequence[Prompt]
    plan: Plan | None = None
    longest: int = 0
    tensor_parallel: int = 1


class Generator(Protocol):
    """An engine over one SFT model. Every response has its own seed, so no answer depends on the other prompts.

    Attributes:
        at_once: how many models one call of `generate` should get: 1 if weights are swapped, more if requests of many
            models share a batch.
    """

    at_once: int

    @property
    def swap_seconds(self) -> float:
        """Seconds spent so far on putting merged weights or adapters into the engine."""
        ...

    def encode(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Return the tokens that the model is given for each prompt."""
        ...

    def generate(
        self, prompts: Sequence[Prompt], spec: GenerationSpec, models: Sequence[Model] = (None,)
    ) -> list[list[Response]]:
        """Return for each model `spec.n` responses to each prompt, those of one prompt next to each other.

        Response k to prompt i has the seed `prompt_seed(spec, i, k)` under every model.
        """
        ...

    def logprobs(self, pairs: Sequence[tuple[Tokens, Tokens]], model: Model = None) -> list[float]:
        """Return log π(tail | head) in nats at temperature 1 for each pair (head, tail) of tokens; no head is empty."""
        ...

    def close(self) -> None:
        """Free the engine, its memory and its processes."""
        ...


def prompt_seed(spec: GenerationSpec, index: int, sample: int = 0) -> int:
    """Return the seed of a response to prompt `index`, the same at every point of a sweep."""
    return spec.seed * _SEED_STRIDE + index + sample * _SAMPLE_STRIDE

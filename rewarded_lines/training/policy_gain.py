"""Responses outside of the trainer: what a policy gained over the SFT model, and samples for preference pairs.

The evaluator's own generators are used, with a seed for every prompt, so that before and after are compared in pairs.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from accelerate import DistributedType, PartialState

from rewarded_lines.config import GenerationSpec
from rewarded_lines.data.prompts import Prompt
from rewarded_lines.engines.base import Response, Workload
from rewarded_lines.engines.isolated_engine import generate_isolated
from rewarded_lines.engines.load_engine import check_engine
from rewarded_lines.engines.transformers_engine import HfGenerator
from rewarded_lines.training.training_reward import WeightedReward

Parts = dict[str, list[float]]


@dataclass(frozen=True)
class Sampler:
    """Answers prompts and scores the answers.

    Attributes:
        reward: what scores them.
        tokenizer: of the models.
        spec: temperature, length, seed and type.
    """

    reward: WeightedReward
    tokenizer: Any
    spec: GenerationSpec

    def responses(self, model: Any, folder: str, prompts: Sequence[Prompt]) -> list[Response]:
        """Return one response for each prompt.

        Args:
            model: a loaded model, out of its wrappers.
            folder: the same model on disk, for a process of its own where the loaded one is spread over several.
            prompts: texts or chats; repeat a prompt to get several responses to it.
        """
        return sample("hf", model, folder, self.tokenizer, self.spec, prompts)

    def measure(self, model: Any, folder: str, prompts: Sequence[Prompt]) -> Parts:
        """Return every reward's scores of one response to each prompt."""
        responses = self.responses(model, folder, prompts)
        return self.reward.parts(prompts, [response.judged for response in responses])


def sample(
    engine: str, model: Any, folder: str, tokenizer: Any, spec: GenerationSpec, prompts: Sequence[Prompt]
) -> list[Response]:
    """Return one response for each prompt; see `Sampler.responses`.

    vLLM gets a process of its own, and so does a model that is spread over several.
    """
    if engine == "vllm" or is_sharded():
        with _off_the_gpu(model):
            return generate_isolated(engine, folder, spec, prompts)
    if not _is_quantized(model):
        # Where the trainer will want it, too; quantized weights are there already.
        model.to(PartialState().device)
    generator = HfGenerator(Workload(folder, spec, prompts), loaded=(model, tokenizer))
    try:
        return generator.generate(prompts, spec)[0]
    finally:
        generator.close()


@contextmanager
def _off_the_gpu(model: Any) -> Iterator[None]:
    """Leave a GPU to another process meanwhile, as far as the model can be moved."""
    device = None if is_sharded() or _is_quantized(model) else model.device
    if device is None or device.type == "cpu":
        yield
        return
    model.to("cpu")
    torch.cuda.empty_cache()
    try:
        yield
    finally:
        model.to(device)


def _is_quantized(model: Any) -> bool:
    return bool(getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False))


def is_sharded() -> bool:
    """Say whether models are spread over processes, so that none of them can answer alone."""
    return PartialState().distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)


def choose_engine(wanted: str) -> str:
    """Return the engine that "auto" means here: vLLM when it is installed.

    Raises:
        UserError: an engine that is named and not installed.
    """
    engine = ("vllm" if find_spec("vllm") else "hf") if wanted == "auto" else wanted
    check_engine(engine, "--sampling_engine")
    return engine


def summary(scores: Sequence[float]) -> str:
    """Return mean and standard error as text."""
    error = statistics.stdev(scores) / len(scores) ** 0.5 if len(scores) > 1 else float("nan")
    return f"{statistics.fmean(scores):.2f} (s.e. {error:.2f})"


def gains(before: Mapping[str, Sequence[float]], after: Mapping[str, Sequence[float]]) -> dict[str, dict[str, Any]]:
    """Return for each reward what `paired_gain` says."""
    return {name: paired_gain(before[name], after[name]) for name in before}


def describe(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Return gains as text, a reward a line."""
    return "\n".join(
        f"`{name}` on validation prompts: {one['before']:.3g} -> {one['after']:.3g}, "
        f"gain {one['gain']:+.3g} [{one['gain_interval'][0]:.3g}, {one['gain_interval'][1]:.3g}]"
        for name, one in found.items()
    )


def paired_gain(before: Sequence[float], after: Sequence[float]) -> dict[str, float | list[float]]:
    """Return both means, the mean gain over the same prompts, and its 95% interval (normal approximation)."""
    differences = [new - old for old, new in zip(before, after, strict=True)]
    mean = statistics.fmean(differences)
    half = 1.96 * statistics.stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else float("nan")
    return {
        "before": statistics.fmean(before),
        "after": statistics.fmean(after),
        "gain": mean,
        "gain_interval": [mean - half, mean + half],
    }

"""Responses sampled outside of the trainer, for preference pairs and a policy's gain over SFT.

The evaluator's engines sample them with one seed for each prompt, so the gain is a paired difference.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import DistributedType, PartialState

from rewarded_lines.config import GenerationSpec
from rewarded_lines.data.prompts import Prompt
from rewarded_lines.engines.base import Response, Workload
from rewarded_lines.engines.isolated_engine import generate_isolated
from rewarded_lines.engines.load_engine import check_engine
from rewarded_lines.engines.transformers_engine import HfGenerator
from rewarded_lines.extras import is_installed

Scores = dict[str, list[float]]
"""The scores of each reward, by its name; NaN for a response on which the reward abstained."""


def sample(
    engine: str, model: Any, folder: str, tokenizer: Any, spec: GenerationSpec, prompts: Sequence[Prompt]
) -> list[Response]:
    """Return one response to each prompt; repeat a prompt to get several.

    vLLM and sharded models run in a process of their own, which loads the model from `folder`.
    """
    if engine == "vllm" or is_sharded():
        with _off_the_gpu(model):
            return generate_isolated(engine, folder, spec, prompts)
    if not is_quantized(model):
        model.to(PartialState().device)
    with _without_autocast(model):
        generator = HfGenerator(Workload(folder, spec, prompts), loaded=(model, tokenizer))
        try:
            return generator.generate(prompts, spec)[0]
        finally:
            generator.close()


@contextmanager
def _without_autocast(model: Any) -> Iterator[None]:
    """Let a trained model answer in its own precision, as before it was trained.

    With `bf16`, accelerate leaves its autocast in the model's forward pass: a gain would compare two precisions.
    """
    own, wrapped = model.__dict__.get("_original_forward"), model.__dict__.get("forward")
    if own is not None:
        model.forward = own
    try:
        yield
    finally:
        if own is not None:
            model.forward = wrapped


@contextmanager
def _off_the_gpu(model: Any) -> Iterator[None]:
    """Move a model to the CPU for the block, if it is on a GPU and can be moved."""
    device = None if is_sharded() or is_quantized(model) else model.device
    if device is None or device.type == "cpu":
        yield
        return
    model.to("cpu")
    torch.cuda.empty_cache()
    try:
        yield
    finally:
        model.to(device)


def is_quantized(model: Any) -> bool:
    """True if bitsandbytes holds a model's weights, which cannot be moved then."""
    return bool(getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False))


def is_sharded() -> bool:
    """True if models are sharded over processes, so that no process can generate alone."""
    return PartialState().distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)


def choose_engine(wanted: str) -> str:
    """Return the engine to use; "auto" is vLLM if it is installed."""
    engine = ("vllm" if is_installed("vllm") else "hf") if wanted == "auto" else wanted
    check_engine(engine, "--sampling_engine")
    return engine

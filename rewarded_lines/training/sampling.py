"""Responses sampled with Hugging Face's generate: for preference pairs, and to measure a policy."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any, cast

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from rewarded_lines.evaluation.prompts import split_text


@torch.inference_mode()
def sample_responses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 128,
) -> list[str]:
    """Return one response for each prompt, sampled from the whole distribution (no top-k, no top-p).

    Args:
        model: a causal language model; put into evaluation mode for the time being.
        tokenizer: its tokenizer, with a token for padding.
        prompts: repeat a prompt to get several responses to it.
        max_tokens: longest response.
        temperature: above 0.
        seed: the same seed, prompts and batch size give the same responses; the global generator is left
            alone.
        batch_size: prompts at a time.
    """
    config = GenerationConfig(
        max_new_tokens=max_tokens,
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    training = model.training
    model.eval()
    responses: list[str] = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for start in range(0, len(prompts), batch_size):
            batch = tokenizer(
                list(prompts[start : start + batch_size]),
                padding=True,
                padding_side="left",
                return_tensors="pt",
            ).to(model.device)
            ids = cast(Any, model).generate(**batch, generation_config=config)
            padding = (1 - batch["attention_mask"]).sum(1).tolist()
            width = batch["input_ids"].shape[1]
            responses += [
                split_text(row[left:], width - left, tokenizer)[1]
                for row, left in zip(ids.tolist(), padding, strict=True)
            ]
    model.train(training)
    return responses


def summary(scores: Sequence[float]) -> str:
    """Return mean and standard error as text."""
    return f"{statistics.fmean(scores):.2f} (s.e. {statistics.stdev(scores) / len(scores) ** 0.5:.2f})"


def paired_gain(before: Sequence[float], after: Sequence[float]) -> dict[str, float | list[float]]:
    """Return both means, the mean gain over the same prompts, and its 95% interval (normal approximation)."""
    differences = [new - old for old, new in zip(before, after, strict=True)]
    mean = statistics.fmean(differences)
    half = 1.96 * statistics.stdev(differences) / len(differences) ** 0.5
    return {
        "before": statistics.fmean(before),
        "after": statistics.fmean(after),
        "gain": mean,
        "gain_interval": [mean - half, mean + half],
    }

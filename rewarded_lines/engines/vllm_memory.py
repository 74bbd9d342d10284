"""How much of a GPU a vLLM engine takes, and how much it computes at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rewarded_lines.errors import fail
from rewarded_lines.out_of_memory import empty_cache
from rewarded_lines.processes import GIB

# Sequences of a small engine's batch. vLLM's 1024 on a large GPU need gigabytes to sample.
_FEW_SEQUENCES = 256
# Tokens of a batch. vLLM takes 16,384 on a large GPU.
_FEW_TOKENS = 2048
# The same for models that also read images: some need one whole image in a batch.
_FEW_TOKENS_WITH_IMAGES = 4096
# Bytes of an engine beside weights, cache and activations: kernels' own memory, and what torch keeps.
_OVERHEAD = GIB
# Bytes that sampling takes for each sequence and token of the vocabulary: float32 logits, sorted with their places.
_SAMPLING = 20
WORKING_MEMORY = 2 * GIB
"""Bytes of a GPU for activations of reward models; one of them computes at a time."""
# Merged adapters that wait in slots of the engine: so many, in at most this share of the free memory.
_MOST_ADAPTERS, _SHARE_OF_ADAPTERS = 16, 0.1


def memory_share(size: float, spare: int, beside: int, devices: int) -> float:
    """Return vLLM's `gpu_memory_utilization`: a share of each GPU's whole memory, the least that any of them allows.

    Args:
        size: bytes that the engine may take; 0 means nine tenths of the free ones.
        spare: bytes of each GPU that must stay free for reward models, beside a tenth.
        beside: bytes of each GPU that base and policies and their merges take.
        devices: how many GPUs the engine uses, from the first one on.

    Raises:
        UserError: nothing is left beside them.
    """
    import torch

    # vLLM counts what torch keeps for later as taken.
    empty_cache()
    shares = []
    for device in range(devices):
        free, total = torch.cuda.mem_get_info(device)
        if spare + beside >= free:
            raise fail(
                "reward models and models that wait on the GPU leave no memory for the engine",
                where=f"vLLM, cuda:{device}",
                expected=f"more than {(spare + beside) / GIB:.1f} GiB free, which they need beside what they hold",
                got=f"{free / GIB:.1f} GiB of {total / GIB:.1f}",
                remedy="set `resident: host`, lower `--reward-memory`, or declare `dtype: bfloat16` in rewards",
            )
        shares.append(min(0.9 * (free - spare) - beside, size or free) / total)
    return round(min(shares), 4)


def few_at_once(longest: int) -> dict[str, int]:
    """Return vLLM's arguments for an engine with little memory, as `working_memory` counts it."""
    # Where a model cannot split a text, all of it must fit into a batch.
    return {"max_num_seqs": _FEW_SEQUENCES, "max_num_batched_tokens": max(longest, _FEW_TOKENS)}


def working_memory(hidden: int, inner: int, longest: int, itemsize: int, sampled: int = 0) -> int:
    """Return the bytes that an engine computes in with the batches of `few_at_once`, at least `WORKING_MEMORY`.

    `hidden` is the width of the residual stream, `inner` that of a token's gates in a block, `longest` the tokens of a
    text, `sampled` those of the vocabulary, if the model also writes texts.
    """
    # A layer's gates, ups and their products; residuals, queries, keys and values.
    activations = few_at_once(longest)["max_num_batched_tokens"] * (3 * inner + 6 * hidden) * itemsize
    return max(WORKING_MEMORY, _OVERHEAD + activations + _FEW_SEQUENCES * sampled * _SAMPLING)


def adapters_at_once(free: int, one: int) -> int:
    """Return how many merged adapters of so many bytes, in float32, the engine keeps; one more slot stays spare."""
    return min(_MOST_ADAPTERS, max(1, int(_SHARE_OF_ADAPTERS * free / max(1, one))))


def beside_for_adapters(asked: str, inputs: int, free: int) -> int:
    """Return the bytes of a GPU that adapters take beside the engine; 0 if they wait in the host's memory or on disk.

    Args:
        asked: the place that is asked for; "auto" is the GPU, too.
        inputs: bytes of the policies' factors and of a merged adapter.
        free: bytes of the GPU.
    """
    return inputs if asked in ("auto", "gpu") and inputs <= _SHARE_OF_ADAPTERS * free else 0


def few_scored_at_once(longest: int, towers: bool, args: Mapping[str, Any]) -> dict[str, int]:
    """Return vLLM's arguments for an engine that scores texts of up to `longest` tokens on a GPU.

    `towers`: the model also reads images or sound.

    vLLM's older runner computes the probabilities of all tokens of a text that are in one batch at once, and reserves
    nothing for that: 16,384 tokens with a vocabulary of 150,000 take 20 GB. So a batch has fewer tokens. The newer
    runner splits them by itself, into 1024 at a time.
    """
    most = _FEW_TOKENS_WITH_IMAGES if towers else _FEW_TOKENS
    if longest <= most:
        return {}
    # vLLM wants at least one token for each sequence.
    return {"max_num_batched_tokens": max(most, args.get("max_num_seqs") or 0)}

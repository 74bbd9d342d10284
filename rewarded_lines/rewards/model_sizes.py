"""Bytes that a reward model takes: its weights, and what an engine needs beside them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from rewarded_lines.checkpoints.reader import INDEX_FILE, SINGLE_FILE, read_json_object
from rewarded_lines.engines.kv_cache import kv_bytes, kv_layers
from rewarded_lines.engines.model_shapes import gates, whole_text
from rewarded_lines.engines.vllm_memory import WORKING_MEMORY, working_memory
from rewarded_lines.errors import fail
from rewarded_lines.out_of_memory import empty_cache
from rewarded_lines.processes import GIB, available_memory
from rewarded_lines.reward_settings import RewardSpec
from rewarded_lines.rewards.reward_checkpoints import shapes_in

LONGEST = 8192
"""The most tokens of a text in vLLM: it reserves keys and values for it, and texts are far below 131,072 tokens."""


def weights_size(reference: str, spec: RewardSpec, config: Any) -> int:
    """Return the bytes of the weights in memory; 0 if their files are not downloaded yet."""
    import torch
    from transformers.utils import cached_file

    folder = Path(str(cached_file(reference, "config.json"))).parent
    index = folder / INDEX_FILE
    names = {*read_json_object(index).get("weight_map", {}).values()} if index.is_file() else {SINGLE_FILE}
    files = [folder / name for name in sorted(names) if (folder / name).is_file()]
    if getattr(config, "quantization_config", None):
        return sum(file.stat().st_size for file in files)
    shapes = [shapes_in(file) for file in files]
    # Loading tells that a file is damaged.
    count = sum(math.prod(shape) for some in shapes for shape in some.values()) if all(shapes) else 0
    return count * int(getattr(torch, spec.dtype).itemsize)


def engine_size(config: Any, spec: RewardSpec, weights: int, longest: int, device: str) -> tuple[int, int]:
    """Return the bytes that an engine may take, 0 if unknown, and those that it holds while it exists.

    Raises:
        MemoryError: the GPU has fewer free bytes.
    """
    import torch

    itemsize, text = getattr(torch, spec.dtype).itemsize, whole_text(config)
    sampled = text["vocab_size"] if spec.judge is not None else 0
    work = working_memory(text["hidden_size"], gates(text), longest, itemsize, sampled)
    needed = weights + kv_bytes(kv_layers(text)[0], longest, itemsize) + work if weights else 0
    if not device.startswith("cuda"):
        return needed, weights
    empty_cache()
    if needed > (free := available_memory(device)):
        raise MemoryError(f"{in_gib(needed)} are needed for vLLM, {in_gib(free)} are free on {device}")
    return needed, needed


def refuse_too_large(where: str, reference: str, spec: RewardSpec, config: Any, device: str) -> None:
    """Refuse a model that is larger than a whole GPU, before its weights are read."""
    if not device.startswith("cuda"):
        return
    size = weights_size(reference, spec, config)
    if size and size + WORKING_MEMORY > (whole := whole_memory(device)):
        raise fail(
            "the reward model is larger than the GPU",
            where=where,
            expected=f"{in_gib(size)} for its weights and {in_gib(WORKING_MEMORY)} to work",
            got=f"{reference} on {device}, {in_gib(whole)}",
            remedy="declare `dtype: auto` or `dtype: bfloat16`, or `device: cpu`; or serve it on several GPUs and name "
            "the server as `url:`",
        )


def whole_memory(device: str) -> int:
    """Return all bytes of a GPU, whoever uses them."""
    import torch

    return torch.cuda.mem_get_info(device)[1]


def in_gib(size: float) -> str:
    """Return bytes for messages."""
    return f"{size / GIB:.1f} GiB"

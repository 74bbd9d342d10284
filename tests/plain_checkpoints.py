"""Checkpoints made by hand, without transformers; read and merged again by other means than the library's own."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import deserialize
from safetensors.numpy import save_file

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 2,
    "vocab_size": 8,
    "tie_word_embeddings": False,
    "dtype": "float32",
}
NUMBERS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "BOOL": "?"} | {
    f"{sign}{8 * size}": f"<{kind}{size}" for sign, kind in (("I", "i"), ("U", "u")) for size in (1, 2, 4, 8)
}
WIDTH = {"F64": 53, "F32": 24, "F16": 11, "BF16": 8}
Tensors = dict[str, np.ndarray]


def tiny_shapes(hidden: int = 4, vocabulary: int = 8) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of a Llama-like model of two blocks."""
    return {
        "model.embed_tokens.weight": (vocabulary, hidden),
        **{f"model.layers.{block}.mlp.up_proj.weight": (hidden, hidden) for block in range(2)},
        **{f"model.layers.{block}.input_layernorm.weight": (hidden,) for block in range(2)},
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocabulary, hidden),
    }


def save_plain(folder: Path, tensors: Tensors, shards: int = 1, **config: Any) -> Path:
    """Write a checkpoint folder of one file or several."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    names = list(tensors)
    parts = [names[part::shards] for part in range(shards)]
    files = [SINGLE] if shards == 1 else [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    for file, part in zip(files, parts, strict=True):
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
    if shards > 1:
        weight_map = {name: file for file, part in zip(files, parts, strict=True) for name in part}
        size = sum(value.nbytes for value in tensors.values())
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}))
    return folder


def save_family(
    folder: Path, names: tuple[str, ...] = ("sft", "first", "second"), shards: int = 1, **sizes: int
) -> Path:
    """Write a base and policies near it, float32; return their folder."""
    random = np.random.default_rng(0)
    base = {name: random.standard_normal(shape, np.float32) for name, shape in tiny_shapes(**sizes).items()}
    for name in names:
        step = 0.0 if name == names[0] else 0.05
        moved = {
            key: value + np.float32(step) * random.standard_normal(value.shape, np.float32)
            for key, value in base.items()
        }
        save_plain(folder / name, moved, shards)
    return folder


def read_plain(folder: Path, file: str = SINGLE) -> dict[str, tuple[str, np.ndarray]]:
    """Return type and values of every tensor as the format's own library reads them; bfloat16 is widened."""
    files = [file]
    if not (folder / file).is_file():
        files = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
    found = {}
    for file in files:
        for name, tensor in deserialize((folder / file).read_bytes()):
            kind = tensor["dtype"]
            values = np.frombuffer(bytes(tensor["data"]), NUMBERS[kind]).reshape(tensor["shape"])
            if kind == "BF16":
                values = (values.astype(np.uint32) << 16).view(np.float32)
            assert name not in found, name
            found[name] = (kind, values)
    return found


def check_formula(
    out: Path,
    base: Path,
    policies: list[Path],
    weights: list[float],
    alpha: float,
    beta: float,
    left_out: set[str] = frozenset(),
) -> None:
    """Hold every tensor of `out` against θ_base + s·Σ λ_i·(θ_i − θ_base), from what the library reads."""
    merged, origin, others = read_plain(out), read_plain(base), [read_plain(policy) for policy in policies]
    for name in left_out:
        origin.pop(name, None)
    assert merged.keys() == origin.keys()
    blocks = [int(match[1]) for name in origin if (match := re.match(r"model\.layers\.(\d+)\.", name))]
    for name, (kind, start) in origin.items():
        match = re.match(r"model\.layers\.(\d+)\.", name)
        scale = alpha + beta * (int(match[1]) / max(blocks) if match and max(blocks) else 0.0)
        kinds = {kind, *(other[name][0] for other in others)}
        if kind not in WIDTH:
            assert merged[name][0] == kind and np.array_equal(merged[name][1], start), name
            continue
        assert WIDTH[merged[name][0]] >= max(WIDTH[k] for k in kinds), name
        with np.errstate(all="ignore"):
            moves = [
                w * scale * (other[name][1].astype(float) - start.astype(float))
                for w, other in zip(weights, others, strict=True)
            ]
            exact = start.astype(float) + sum(moves)
            room = (np.abs(start.astype(float)) + sum(map(np.abs, moves))) * 2.0 ** -WIDTH[merged[name][0]] + 2.0**-140
            assert merged[name][1].shape == start.shape, name
            assert (np.abs(merged[name][1] - exact) <= room).all(), name

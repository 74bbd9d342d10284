"""Tiny models of families that name one tensor in several ways, and what the tests of names share."""

from __future__ import annotations

import json

import torch
from architectures import ARCHITECTURES, LLAMA, MIXTRAL, QWEN3_EYE, QWEN_EYE, QWEN_MOE, TOKENS
from safetensors.torch import load_file, save_file

from rewarded_lines.merger.lines_schedule import lines_scale

WEIGHTS, ALPHA, BETA = (0.25, 0.75), 0.5, 0.75
LINEAR = {
    **{f"linear_{name}_head_dim": 16 for name in ("key", "value")},
    **{f"linear_num_{name}_heads": 2 for name in ("key", "value")},
}
MTP = {"mtp.fc.weight": (64, 128), "mtp.layers.0.mlp.down_proj.weight": (64, 96), "mtp.norm.weight": (64,)}
PHIMOE = {**MIXTRAL, "num_key_value_heads": 2, "hidden_size": 64, "rope_parameters": {"rope_theta": 1e4}}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}
QWEN35 = {
    "text_config": {**LLAMA, **LINEAR, "num_hidden_layers": 4, "tie_word_embeddings": True},
    "vision_config": {**QWEN_EYE, **QWEN3_EYE, "num_position_embeddings": 16},
    "tie_word_embeddings": True,
}


def build(model, config, settings):
    """Return a function that makes a model of transformers."""

    def made():
        import transformers

        torch.manual_seed(0)
        return getattr(transformers, model)(getattr(transformers, config)(**settings)).eval()

    return made


MODELS = {
    **ARCHITECTURES,
    "phimoe": build("PhimoeForCausalLM", "PhimoeConfig", PHIMOE),
    "bloom": build("BloomForCausalLM", "BloomConfig", {**TOKENS, "hidden_size": 64, "n_layer": 3, "n_head": 2}),
    "qwen3-next": build(
        "Qwen3NextForCausalLM",
        "Qwen3NextConfig",
        {**QWEN_MOE, **LINEAR, "num_hidden_layers": 4, "shared_expert_intermediate_size": 32},
    ),
    "qwen3-vl-moe": build(
        "Qwen3VLMoeForConditionalGeneration",
        "Qwen3VLMoeConfig",
        {
            "text_config": {**QWEN_MOE, "num_experts": 3, "rope_parameters": MROPE},
            "vision_config": {**QWEN_EYE, **QWEN3_EYE, "num_position_embeddings": 16},
        },
    ),
    "qwen3.5": build("Qwen3_5ForConditionalGeneration", "Qwen3_5Config", QWEN35),
    "glm4-moe": build(
        "Glm4MoeForCausalLM",
        "Glm4MoeConfig",
        {
            **QWEN_MOE,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "num_experts_per_tok": 2,
        },
    ),
}


def edit(folder, change):
    """Rewrite the tensors of a checkpoint."""
    if change:
        file = folder / "model.safetensors"
        content = {name: value.contiguous() for name, value in change(load_file(file)).items()}
        save_file(content, file, metadata={"format": "pt"})


def edit_config(folder, **settings):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def scale_of(name, config):
    """Return the scale of a tensor by the number after its block list; towers have their own length."""
    places = [int(part) for part in name.split(".") if part.isdigit()]
    inside = ".layers." in f".{name}" or ".h." in f".{name}" or ".blocks." in f".{name}"
    vision = getattr(config, "vision_config", None)
    of_tower = vision is not None and ("vis" in name)
    text = config.get_text_config()
    blocks = (getattr(vision, "depth", None) or vision.num_hidden_layers) if of_tower else text.num_hidden_layers
    return lines_scale(places[0] if inside and places else None, blocks, ALPHA, BETA)


def without(prefix):
    return lambda tensors: {name.removeprefix(prefix): value for name, value in tensors.items()}

"""Lists of blocks that no table knows: each has its own depth, is refused, or is what the user says."""

import json
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from architectures import BERT, LLAMA, OPT, TOKENS, VISION
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import perturb

from rewarded_lines import inspect, merge
from rewarded_lines.merger.merge import replay
from rewarded_lines.errors import UserError

ALPHA, BETA, WEIGHT = 0.3, 0.9, 0.25
EYE = {**VISION, "num_hidden_layers": 4}
MAMBA = {**TOKENS, "hidden_size": 32, "num_hidden_layers": 3, "state_size": 8, "num_heads": 4, "head_dim": 16}
QUERIES = {**BERT, "num_hidden_layers": 2, "encoder_hidden_size": 64}
# Class, config class, settings, and the lists of blocks that transformers' modules show, with their lengths.
MODELS = {
    "mpt": (
        "MptForCausalLM",
        "MptConfig",
        {**TOKENS, "d_model": 32, "n_heads": 2, "n_layers": 3},
        {"transformer.blocks": 3},
    ),
    "mamba2": ("Mamba2ForCausalLM", "Mamba2Config", {**MAMBA, "n_groups": 2}, {"backbone.layers": 3}),
    "biogpt": ("BioGptForCausalLM", "BioGptConfig", BERT, {"biogpt.layers": 3}),
    "rembert": ("RemBertForCausalLM", "RemBertConfig", {**BERT, "is_decoder": True}, {"rembert.encoder.layer": 3}),
    "xlm": (
        "XLMWithLMHeadModel",
        "XLMConfig",
        {**TOKENS, "emb_dim": 32, "n_layers": 3, "n_heads": 2, "n_words": 300},
        {f"transformer.{part}": 3 for part in ("attentions", "layer_norm1", "ffns", "layer_norm2")},
    ),
    "blip-2": (
        "Blip2ForConditionalGeneration",
        "Blip2Config",
        {"vision_config": EYE, "qformer_config": QUERIES, "text_config": {**OPT, "model_type": "opt"}},
        {"qformer.encoder.layer": 2, "vision_model.encoder.layers": 4, "language_model.model.decoder.layers": 3},
    ),
    "mllama": (
        "MllamaForConditionalGeneration",
        "MllamaConfig",
        {
            "text_config": {**LLAMA, "cross_attention_layers": [1]},
            "vision_config": {
                **{**EYE, "attention_heads": 2, "num_global_layers": 2, "vision_output_dim": 320},
                **{
                    "intermediate_layers_indices": [0, 1, 2, 3],
                    "supported_aspect_ratios": [[1, 1]],
                    "max_num_tiles": 1,
                },
            },
        },
        {
            **{"vision_model.global_transformer.layers": 2, "vision_model.transformer.layers": 4},
            "language_model.model.layers": 3,
        },
    ),
    "mistral-3": (
        "Mistral3ForConditionalGeneration",
        "Mistral3Config",
        {
            "text_config": {**LLAMA, "model_type": "mistral"},
            "vision_config": {**EYE, "model_type": "pixtral", "head_dim": 32},
            "image_token_index": 299,
        },
        {"vision_tower.transformer.layers": 4, "language_model.model.layers": 3},
    ),
}


def make(name):
    import transformers

    model, config, settings, _ = MODELS[name]
    torch.manual_seed(0)
    return getattr(transformers, model)(getattr(transformers, config)(**settings))


def save_models(name, folder):
    """Save a base and two policies."""
    make(name).save_pretrained(folder / "base")
    for seed, policy in enumerate(("first", "second"), start=1):
        perturb(make(name), seed).save_pretrained(folder / policy)


def scale_of(tensor, lists):
    """Return the LiNeS scale by the list that a tensor is in."""
    for path, blocks in lists.items():
        if match := re.match(rf"{re.escape(path)}\.([0-9]+)\.", tensor):
            return ALPHA + (BETA * int(match[1]) / (blocks - 1) if blocks > 1 else 0)
    return ALPHA


def check_values(folder, out, scale):
    """Compare a merge with base + scale·(λ·τ₁ + (1 − λ)·τ₂) in float64."""
    base, first, second, merged = (
        load_file(folder / name / "model.safetensors") for name in ("base", "first", "second", out)
    )
    assert merged.keys() == base.keys()
    for tensor, value in base.items():
        if not value.is_floating_point():
            continue
        steps = [policy[tensor].double() - value.double() for policy in (first, second)]
        exact = value.double() + scale(tensor) * (WEIGHT * steps[0] + (1 - WEIGHT) * steps[1])
        assert torch.allclose(merged[tensor].double(), exact, rtol=2.0**-23, atol=1e-30), tensor


def merged(folder, out, **how):
    (result,) = merge(
        folder / "base", [folder / "first", folder / "second"], WEIGHT, alpha=ALPHA, beta=BETA, out=folder / out, **how
    )
    return result


@pytest.mark.parametrize("name", MODELS)
def test_every_list_has_its_own_depth(name, tmp_path):
    save_models(name, tmp_path)
    lists = MODELS[name][3]
    assert {path: len(scales) for path, scales in merged(tmp_path, "out").scales.items()} == lists
    check_values(tmp_path, "out", lambda tensor: scale_of(tensor, lists))

"""Every known architecture end to end: saved by transformers, merged, loaded and run by transformers."""

from __future__ import annotations

import json

import pytest
import torch
from architectures import ARCHITECTURES, CAUSAL, ENCODER_DECODERS
from safetensors.torch import load_file
from tiny_models import PROMPTS, make_tokenizer, perturb

from rewarded_lines import merge
from rewarded_lines.checkpoints.tensor_depth import find_depths
from rewarded_lines.config import GenerationSpec
from rewarded_lines.engines.load_engine import load_generator

# One of each layout; the others are variants, and marked slow because they are many.
REPRESENTATIVE = {
    *("llama", "llama-tied", "mixtral", "qwen2", "qwen3-moe", "gemma2", "phi", "gpt2", "gpt-neox", "opt", "falcon-new"),
    *("llama-base", "llama-reward", "t5", "bart", "bert", "distilbert", "vit", "clip", "llava", "qwen2-vl"),
}
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ARCHITECTURES if name not in REPRESENTATIVE]
NAMES = [*(name for name in ARCHITECTURES if name in REPRESENTATIVE), *SLOW]


def save_family(name, folder):
    """Save base and two policies, each perturbed in its own way; return the class of the model."""
    ARCHITECTURES[name]().save_pretrained(folder / "base")
    for seed, policy in enumerate(("first", "second"), start=1):
        model = perturb(ARCHITECTURES[name](), seed)
        model.save_pretrained(folder / policy)
    return type(model)


def run(model):
    """Return the model's output for small inputs of its kind."""
    config = model.config
    tokens = torch.tensor([[17, 99, 201, 5, 42, 2]])  # the last is the end token, which some heads need
    pixels = torch.linspace(-1, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)
    match config.model_type:
        case "vit" | "clip_vision_model":
            given = {"pixel_values": pixels}
        case "clip" | "siglip":
            given = {"pixel_values": pixels, "input_ids": tokens}
        case "t5" | "mt5" | "bart" if config.is_encoder_decoder and "Classification" not in type(model).__name__:
            given = {"input_ids": tokens, "decoder_input_ids": tokens[:, :3]}
        case _:
            given = {"input_ids": tokens}
    if "ForImageClassification" in type(model).__name__:
        given = {"pixel_values": pixels}
    with torch.no_grad():
        return model(**given, return_dict=True)


@pytest.mark.parametrize("name", NAMES)
def test_end_to_end(name, tmp_path):
    kind = save_family(name, tmp_path)
    (result,) = merge(
        tmp_path / "base", [tmp_path / "first", tmp_path / "second"], 0.3, alpha=0.5, beta=1.0, out=tmp_path / "out"
    )
    folders = ("base", "first", "second", "out")
    base, first, second, out = (load_file(tmp_path / folder / "model.safetensors") for folder in folders)
    assert out.keys() == base.keys()
    depths = find_depths(base, json.loads((tmp_path / "base/config.json").read_text()))
    for stack, blocks in depths.stacks.items():
        assert result.scales[stack] == pytest.approx([0.5 + block / (blocks - 1) for block in range(blocks)])
    for tensor, value in base.items():
        if not value.is_floating_point():
            assert torch.equal(out[tensor], value)
            continue
        place = depths.place[tensor]
        scale = 0.5 if place.block is None else 0.5 + place.block / (place.blocks - 1)
        steps = [policy[tensor].double() - value.double() for policy in (first, second)]
        exact = value.double() + scale * (0.3 * steps[0] + 0.7 * steps[1])
        assert torch.allclose(out[tensor].double(), exact, rtol=2.0**-24 * 1.01, atol=1e-40), tensor

    model, info = kind.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    computed = [value for value in run(model).values() if isinstance(value, torch.Tensor)]
    assert computed and all(torch.isfinite(value).all() for value in computed)
    # The model must run with the tensors of the file, tied or not.
    state = model.state_dict()
    for tensor, value in out.items():
        if tensor in state:
            assert torch.equal(state[tensor], value), tensor
    if name in CAUSAL or (name in ENCODER_DECODERS and model.can_generate()):
        generated = model.generate(torch.tensor([[5, 9, 14]]), max_new_tokens=6, min_new_tokens=6, do_sample=False)
        assert generated.shape[1] >= 6


@pytest.mark.parametrize("name", ["llama", "llava", "gemma3-images", "qwen2-vl", "clip"])
def test_loaded_as_the_config_says_no_bit_is_lost(name, tmp_path):
    """Nested configs have a dtype too: bfloat16 in the base, though the merge is float32."""
    kind = save_family(name, tmp_path)
    ARCHITECTURES[name]().bfloat16().save_pretrained(tmp_path / "narrow")
    for target, dtype, expected in (("wide", "auto", torch.float32), ("cast", "float16", torch.float16)):
        merge(tmp_path / "narrow", [tmp_path / "first"], 1.0, dtype=dtype, out=tmp_path / target)
        state = kind.from_pretrained(tmp_path / target, dtype="auto").state_dict()
        for tensor, value in load_file(tmp_path / target / "model.safetensors").items():
            if value.is_floating_point() and tensor in state:
                assert state[tensor].dtype == expected and torch.equal(state[tensor], value), tensor


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen2", "qwen3"])
def test_vllm_generates_as_transformers_does(name, tmp_path):
    pytest.importorskip("vllm", reason="vLLM is not installed in this environment")
    save_family(name, tmp_path)
    make_tokenizer().save_pretrained(tmp_path / "base")
    merge(tmp_path / "base", [tmp_path / "first", tmp_path / "second"], 0.3, alpha=0.5, out=tmp_path / "out")
    greedy, answers = GenerationSpec(temperature=0, max_tokens=12), []
    for engine in ("hf", "vllm"):
        generator = load_generator(engine, str(tmp_path / "out"), greedy, PROMPTS)
        try:
            answers.append([response.tokens for response in generator.generate(PROMPTS, greedy)[0]])
        finally:
            generator.close()
    assert answers[0] == answers[1] and len(answers[0]) == len(PROMPTS)

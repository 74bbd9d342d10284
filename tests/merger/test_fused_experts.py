"""Adapters of fused experts (PEFT's `target_parameters`), against PEFT's own float64 merge and the formula."""

import json

import pytest
import torch
import transformers
from architectures import LLAMA, MIXTRAL, QWEN_MOE
from peft import PeftModel
from tiny_adapters import edit_settings, factors, save_adapter, settings_of

from rewarded_lines import merge
from rewarded_lines.errors import UserError
from rewarded_lines.merger.lines_schedule import lines_scale

BLOCKS = 3
GPT_OSS = {**LLAMA, "num_local_experts": 3, "num_experts_per_tok": 1, "layer_types": ["full_attention"] * BLOCKS}
DEEPSEEK = {
    **{**LLAMA, "num_key_value_heads": 2, "moe_intermediate_size": 48, "n_routed_experts": 4, "num_experts_per_tok": 2},
    **{"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16},
    **{"qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16, "head_dim": 16},
}
# Stored as one tensor per expert, some under other names than in memory, and as fused tensors, [in, out] or [out, in].
MIXTURES = {
    "Qwen3Moe": {**QWEN_MOE, "num_experts": 3},
    "Mixtral": {**MIXTRAL, "num_local_experts": 3},
    "GptOss": GPT_OSS,
    "DeepseekV3": DEEPSEEK,
    "GraniteMoe": {**MIXTRAL, "num_local_experts": 3},
}
SLOW = ("DeepseekV3", "GraniteMoe")


def build(name, **changes):
    torch.manual_seed(7)
    config = getattr(transformers, f"{name}Config")(**{**MIXTURES[name], "tie_word_embeddings": False, **changes})
    return getattr(transformers, f"{name}ForCausalLM")(config)


def scale_of(name, alpha, beta):
    block = next((int(part) for part in name.split(".") if part.isdigit()), None)
    return lines_scale(block, BLOCKS, alpha, beta)


def residual(kind, base, adapter):
    """Return what PEFT's merge of one adapter adds to each parameter, in float64."""
    start = kind.from_pretrained(base, dtype=torch.float64)
    before = {name: value.clone() for name, value in start.state_dict().items()}
    model = PeftModel.from_pretrained(start, adapter, autocast_adapter_dtype=False)
    after = model.double().merge_and_unload().state_dict()
    return before, {name: after[name] - value for name, value in before.items()}


def check(kind, base, adapters, weights, out, alpha=0.4, beta=0.8, folded=False):
    before, parts = {}, []
    for adapter in adapters:
        before, change = residual(kind, base, adapter)
        parts.append(change)
    if folded:
        found = kind.from_pretrained(out, dtype=torch.float64).state_dict()
    else:
        start, change = residual(kind, base, out)
        found = {name: value + change[name] for name, value in start.items()}
    moved = 0
    for name, value in before.items():
        terms = [scale_of(name, alpha, beta) * w * part[name] for w, part in zip(weights, parts, strict=True)]
        exact = value + sum(terms)
        room = (value.abs().max() + sum(term.abs().max() for term in terms)) * 2.0**-22
        assert (found[name] - exact).abs().max() <= room, name
        moved += bool(sum(terms).any())
    return moved


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def save_two(here, model, **settings):
    kind = type(model)
    model.save_pretrained(here / "base")
    for seed, name in enumerate(("one", "two"), start=1):
        save_adapter(here / "base", here / name, seed, kind, r=seed, lora_alpha=3, **settings)
    return kind


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in MIXTURES]
)
def test_all_linear_of_a_mixture(here, name):
    targets = "all-linear"
    if name in ("GptOss", "GraniteMoe"):
        # PEFT rewrites `all-linear` for families that once had a module for each expert.
        targets = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "target_modules": ["q_proj"]}
    settings = targets if isinstance(targets, dict) else {"target_modules": targets}
    kind = save_two(here, build(name), **settings)
    assert settings_of(here / "one")["target_parameters"]
    for as_ in ("adapter", "full"):
        merge("base", ["one", "two"], 0.3, alpha=0.4, beta=0.8, as_=as_, out=as_)
        moved = check(kind, "base", ["one", "two"], (0.3, 0.7), as_, folded=as_ == "full")
        assert moved >= 2 * (BLOCKS - 1)


def test_policies_that_target_different_parameters(here):
    model = build("Qwen3Moe")
    kind = type(model)
    model.save_pretrained(here / "base")
    save_adapter(here / "base", here / "one", 1, kind, target_parameters=["mlp.experts.gate_up_proj"])
    both = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    save_adapter(here / "base", here / "two", 2, kind, r=2, target_parameters=both, use_rslora=True)
    save_adapter(here / "base", here / "three", 3, kind, target_modules=["o_proj"])
    for as_ in ("adapter", "full"):
        merge("base", ["one", "two", "three"], "0.2,0.5,0.3", alpha=0.4, beta=0.8, as_=as_, out=as_)
        check(kind, "base", ["one", "two", "three"], (0.2, 0.5, 0.3), as_, folded=as_ == "full")
    # α = 0 leaves the first block out, so its experts are not wrapped.
    merge("base", ["one", "two"], 0.3, alpha=0, beta=1, out="late")
    check(kind, "base", ["one", "two"], (0.3, 0.7), "late", 0, 1)
    assert not [name for name in factors(here / "late") if ".layers.0." in name]


def test_an_end_of_the_line_repeats_the_adapter(here):
    save_two(here, build("Mixtral"), target_modules="all-linear")
    merge("base", ["one", "two"], 1, beta=0, out="end")
    assert all(torch.equal(value, factors(here / "one")[name]) for name, value in factors(here / "end").items())
    assert settings_of(here / "end") == settings_of(here / "one")


def test_a_base_without_weights_is_enough(here):
    kind = save_two(here, build("Qwen3Moe"), target_modules="all-linear")
    merge("base", ["one", "two"], 0.3, alpha=0.4, beta=0.8, out="whole")
    (here / "base/model.safetensors").rename(here / "weights")
    merge("base", ["one", "two"], 0.3, alpha=0.4, beta=0.8, out="bare")
    assert all(torch.equal(value, factors(here / "whole")[name]) for name, value in factors(here / "bare").items())
    (here / "weights").rename(here / "base/model.safetensors")
    check(kind, "base", ["one", "two"], (0.3, 0.7), "bare")


def test_square_experts_of_an_old_peft_are_refused_and_the_remedy_works(here):
    kind = save_two(here, build("Qwen3Moe", moe_intermediate_size=64), target_modules="all-linear")
    for name in ("one", "two"):
        edit_settings(here / name, peft_version="0.18.0")
    with pytest.raises(UserError, match="write its version as peft_version"):
        merge("base", ["one", "two"], 0.3, as_="full", out="out")
    for name in ("one", "two"):
        edit_settings(here / name, peft_version="0.19.1")
    merge("base", ["one", "two"], 0.3, alpha=0.4, beta=0.8, as_="full", out="out")
    check(kind, "base", ["one", "two"], (0.3, 0.7), "out", folded=True)


def test_fused_and_separate_experts_do_not_make_one_adapter_but_a_model(here):
    kind = save_two(here, build("Qwen3Moe"), target_modules="all-linear")
    values = {}
    generator = torch.Generator().manual_seed(5)
    for block in range(BLOCKS):
        for expert in range(3):
            for part, out, columns in (("gate_proj", 48, 64), ("up_proj", 48, 64), ("down_proj", 64, 48)):
                name = f"base_model.model.model.layers.{block}.mlp.experts.{expert}.{part}"
                values[f"{name}.lora_A.weight"] = 0.1 * torch.randn(2, columns, generator=generator)
                values[f"{name}.lora_B.weight"] = 0.1 * torch.randn(out, 2, generator=generator)
    from safetensors.torch import save_file

    (here / "old").mkdir()
    save_file(values, here / "old/adapter_model.safetensors", {"format": "pt"})
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["gate_proj", "up_proj", "down_proj"]}
    (here / "old/adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="pass --as full"):
        merge("base", ["one", "old"], 0.3, out="out")
    merge("base", ["one", "old"], 0.3, alpha=0.4, beta=0.8, as_="full", out="out")
    check(kind, "base", ["one", "old"], (0.3, 0.7), "out", folded=True)


def test_a_rank_that_gives_fewer_experts_than_the_base_has(here):
    """PEFT itself writes such settings where a `rank_pattern` meets the fused experts of a Mixtral."""
    save_two(here, build("Mixtral", num_local_experts=4), target_modules="all-linear")
    rank = settings_of(here / "one")["r"]
    edit_settings(here / "one", rank_pattern={"down_proj": 2 * rank})
    with pytest.raises(UserError, match="with 2 experts"):
        merge("base", ["one"], 1, as_="full", out="out")


def test_parameters_that_the_settings_do_not_name(here):
    save_two(here, build("Qwen3Moe"), target_modules="all-linear")
    edit_settings(here / "one", target_parameters=["gate.weight", "gate_up_proj"])
    with pytest.raises(UserError, match="do not say which parameter"):
        merge("base", ["one", "two"], 0.3, out="out")
    full = ["gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    edit_settings(here / "one", target_parameters=full)
    merge("base", ["one", "two"], 0.3, out="out")

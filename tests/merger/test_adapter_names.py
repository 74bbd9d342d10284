"""Adapters whose modules have other names than the base's tensors, against PEFT's own merge in float64."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from peft import PeftModel
from renamed_models import ALPHA, BETA, MODELS, WEIGHTS, edit, scale_of, without
from safetensors.torch import load_file, save_file
from tiny_adapters import save_adapter
from tiny_models import perturb

from rewarded_lines import merge

TEXT = r".*language_model.*\.(q_proj|down_proj)"
PREFIX = "base_model.model."
CASES = {
    "gemma3-images": {"target_modules": TEXT},
    "llava": {"target_modules": r".*\.(q_proj|linear_1)"},
    "qwen2-vl": {"target_modules": TEXT},
    "qwen3-vl": {"target_modules": ["q_proj", "qkv"]},
    "phimoe": {"target_modules": ["q_proj", "router"]},
    "mixtral": {"target_modules": ["v_proj"]},
    "gpt2": {"target_modules": ["c_attn"], "fan_in_fan_out": True},
    "bloom": {"target_modules": ["query_key_value"]},
}


def save_case(folder, model, change=None, kind=None, **settings):
    """Save a base, whose file `change` edits, and two adapters that PEFT makes over it in memory."""
    first = perturb(MODELS[model](), 9)
    first.save_pretrained(folder / "base")
    edit(folder / "base", change)
    kind = kind or type(first)
    for seed in (1, 2):
        save_adapter(folder / "base", folder / f"a{seed}", seed, kind, **{"task_type": None, **settings})
    return kind


def run(folder, **more):
    policies = [folder / "a1", folder / "a2"]
    (result,) = merge(folder / "base", policies, WEIGHTS[0], alpha=ALPHA, beta=BETA, **more)
    return result


def merged_by_peft(kind, base, adapter):
    """Return the state of a base with an adapter folded in, in float64."""
    with warnings.catch_warnings():
        # A module that PEFT does not find would be missing in the sum.
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")
        warnings.filterwarnings("ignore", message=".*fan_in_fan_out.*")
        model = kind.from_pretrained(base).double()
        model = PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=False).double()
        return model.merge_and_unload().state_dict()


def check_values(folder, kind, found):
    """Compare a state with base + s·Σ λ·τ, τ by PEFT."""
    model = kind.from_pretrained(folder / "base")
    policies = [merged_by_peft(kind, folder / "base", folder / name) for name in ("a1", "a2")]
    changed = 0
    for name, base in model.state_dict().items():
        residuals = [weight * (one[name] - base.double()) for weight, one in zip(WEIGHTS, policies, strict=True)]
        expected = base.double() + scale_of(name, model.config) * sum(residuals)
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-6, atol=1e-6)
        changed += not torch.equal(base.double(), expected)
    assert changed


def check_both(folder, kind):
    """Merge into an adapter, which PEFT loads over the base, and into a whole model, which transformers loads."""
    run(folder, out=folder / "adapter")
    check_values(folder, kind, merged_by_peft(kind, folder / "base", folder / "adapter"))
    result = run(folder, out=folder / "full", as_="full")
    check_values(folder, kind, kind.from_pretrained(folder / "full").state_dict())
    assert set(load_file(folder / "full/model.safetensors")) == set(load_file(folder / "base/model.safetensors"))
    return result


SLOW = ("qwen3-vl", "mixtral", "bloom", "llava", "phimoe")


@pytest.mark.parametrize(
    "model", [pytest.param(model, marks=pytest.mark.slow) if model in SLOW else model for model in CASES]
)
def test_names_in_memory_and_on_disk(model, tmp_path):
    """Of the Hub's gpt2 and bloom, too, which have no prefix."""
    change = without("transformer.") if model in ("gpt2", "bloom") else None
    check_both(tmp_path, save_case(tmp_path, model, change, **CASES[model]))


def test_adapters_of_the_text_model_alone(tmp_path):
    from transformers import AutoModelForCausalLM

    kind = save_case(tmp_path, "qwen3.5", kind=AutoModelForCausalLM, target_modules=["up_proj", "down_proj"])
    result = check_both(tmp_path, kind)
    assert any("is the base's model.language_model.layers" in note for note in result.notes)


def rewrite(folder, rename):
    path = folder / "adapter_model.safetensors"
    save_file({rename(name): value for name, value in load_file(path).items()}, path)


def check_equal(first, second):
    """Compare B·A of two adapters: the order in which the policies stand in them depends on their files."""
    one, two = (load_file(folder / "adapter_model.safetensors") for folder in (first, second))
    assert one.keys() == two.keys()
    for name in one:
        if name.endswith("lora_A.weight"):
            b = name.replace("lora_A", "lora_B")
            torch.testing.assert_close(one[b] @ one[name], two[b] @ two[name])


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name.replace(PREFIX, f"{PREFIX}_orig_mod."),
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module.{name}",
        lambda name: name.replace(".self_attn.", "._checkpoint_wrapped_module.self_attn."),
        lambda name: name.removeprefix(PREFIX),
        lambda name: name.replace(".weight", ".default.weight"),
    ],
)
def test_names_that_trainers_and_compilers_write(rename, tmp_path):
    kind = save_case(tmp_path, "llama")
    run(tmp_path, out=tmp_path / "plain")
    rewrite(tmp_path / "a1", rename)
    run(tmp_path, out=tmp_path / "adapter")
    check_equal(tmp_path / "plain", tmp_path / "adapter")
    run(tmp_path, out=tmp_path / "full", as_="full")
    assert kind.from_pretrained(tmp_path / "full")


def test_one_adapter_of_the_whole_and_one_of_the_base_model(tmp_path):
    """An adapter of LlamaModel has no `model.` in front; both mean the same modules."""
    save_case(tmp_path, "llama")
    run(tmp_path, out=tmp_path / "plain")
    rewrite(tmp_path / "a2", lambda name: name.replace(f"{PREFIX}model.", PREFIX))
    run(tmp_path, out=tmp_path / "adapter")
    check_equal(tmp_path / "plain", tmp_path / "adapter")
    # A base without weights knows no names, and the adapters' are enough.
    (tmp_path / "base/model.safetensors").unlink()
    run(tmp_path, out=tmp_path / "bare")
    check_equal(tmp_path / "plain", tmp_path / "bare")


@pytest.mark.parametrize("model", ["gemma3-images", "llava"])
def test_modules_that_are_saved_whole(model, tmp_path):
    kind = save_case(tmp_path, model, target_modules=TEXT, modules_to_save=["linear_1", "mm_soft_emb_norm"])
    check_both(tmp_path, kind)
    saved = [name for name in load_file(tmp_path / "adapter/adapter_model.safetensors") if "lora_" not in name]
    assert saved and all(name.startswith(f"{PREFIX}model.multi_modal_projector") for name in saved)
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["modules_to_save"]

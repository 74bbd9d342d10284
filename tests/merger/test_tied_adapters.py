"""Adapters of tied head and embeddings, and of single rows of embeddings, against PEFT's own models and the formula."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_adapters import edit_settings, factors, load_adapter, save_adapter, settings_of
from transformers import AutoModelForCausalLM

from rewarded_lines import merge
from rewarded_lines.config import GenerationSpec
from rewarded_lines.engines.load_engine import load_generator
from rewarded_lines.errors import UserError
from rewarded_lines.merger.lines_schedule import lines_scale
from rewarded_lines.merger.open_inputs import plan_merge

HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"
PROMPT = torch.tensor([[1, 5, 9, 33, 120]])
BOTH = ["embed_tokens", "lm_head"]
TIED = {
    "modules": {"modules_to_save": BOTH, "ensure_weight_tying": True},
    "embeddings": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "low-rank": {"target_modules": ["q_proj", *BOTH], "ensure_weight_tying": True},
    "rows": {"trainable_token_indices": [3, 7, 299]},
}
APART = {
    "modules": {"modules_to_save": BOTH},
    "head": {"modules_to_save": ["lm_head"]},
    "embeddings": {"modules_to_save": ["embed_tokens"]},
    "low-rank": {"target_modules": ["q_proj", *BOTH]},
    "low-rank-head": {"target_modules": ["q_proj", "lm_head"]},
    "low-rank-embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
}
SLOW = ("embeddings", "low-rank-embeddings")


def matrices(base, adapter=None):
    """Return every matrix of a model in memory in float64, with PEFT's merge of an adapter; the head is listed, too.

    PEFT's forward pass adds the change of each layer to that layer only, but its merge adds both to one tied tensor.
    """
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    if adapter:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        model = PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=False).double().merge_and_unload()
    found = {name: value.clone() for name, value in model.state_dict().items()}
    found[HEAD] = model.lm_head.weight.detach().clone()
    return found


def check(base, adapters, weights, out, alpha=0.5, beta=0.5, adapter=False):
    before, parts = matrices(base), [matrices(base, one) for one in adapters]
    found = matrices(base, out) if adapter else matrices(out)
    for name, value in before.items():
        block = next((int(part) for part in name.split(".") if part.isdigit()), None)
        scale = lines_scale(block, 4, alpha, beta)
        terms = [scale * weight * (part[name] - value) for weight, part in zip(weights, parts, strict=True)]
        room = (value.abs().max() + sum(term.abs().max() for term in terms)) * 2.0**-22
        assert (found[name] - value - sum(terms)).abs().max() <= room, name
    return found


def save_two(tiny, **settings):
    for seed, name in enumerate(("one", "two"), start=1):
        save_adapter(tiny / "sft", tiny / name, seed, r=1 + seed, **settings)


@pytest.mark.parametrize("kind", list(TIED))
def test_what_changes_both_alike_stays_tied(tiny, kind):
    save_two(tiny, **TIED[kind])
    for as_ in ("adapter", "full"):
        merge("sft", ["one", "two"], 0.3, alpha=0.5, beta=0.5, as_=as_, out=as_)
        found = check("sft", ["one", "two"], (0.3, 0.7), as_, adapter=as_ == "adapter")
        # As an adapter each is rounded by itself.
        assert torch.allclose(found[HEAD], found[EMBEDDINGS], rtol=0, atol=1e-6 if as_ == "adapter" else 0)
        assert not torch.equal(found[HEAD], matrices("sft")[HEAD])
    assert HEAD not in load_file("full/model.safetensors")
    assert json.loads((tiny / "full/config.json").read_text())["tie_word_embeddings"] is True
    merge("sft", ["one", "two"], 1, beta=0, out="end")
    assert all(torch.equal(value, factors(tiny / "one")[name]) for name, value in factors(tiny / "end").items())
    assert settings_of(tiny / "end") == settings_of(tiny / "one")


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow) if kind in SLOW else kind for kind in APART]
)
def test_what_changes_them_apart_is_untied(tiny, kind):
    save_two(tiny, **APART[kind])
    for as_ in ("adapter", "full"):
        (result,) = merge("sft", ["one", "two"], 0.3, alpha=0.5, beta=0.5, as_=as_, out=as_)
        found = check("sft", ["one", "two"], (0.3, 0.7), as_, adapter=as_ == "adapter")
        assert not torch.equal(found[HEAD], found[EMBEDDINGS])
    assert any("one tensor in the base and two in the output" in note for note in result.notes)
    assert json.loads((tiny / "full/config.json").read_text())["tie_word_embeddings"] is False
    assert {HEAD, EMBEDDINGS} <= set(load_file("full/model.safetensors"))


def test_a_config_that_ties_in_the_section_of_the_text_alone(tiny):
    """Before version 5 transformers wrote so for LLaVA over a tied text model: its class reads both."""
    save_adapter(tiny / "sft", tiny / "one", 1, **APART["embeddings"])
    config = json.loads((tiny / "sft/config.json").read_text())
    said = {"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": True}}
    (tiny / "sft/config.json").write_text(json.dumps(config | said))
    start = load_file("sft/model.safetensors")[EMBEDDINGS]
    merge("sft", ["one"], 0.5, method="wise-ft", as_="full", out="out")
    found, config = load_file("out/model.safetensors"), json.loads((tiny / "out/config.json").read_text())
    assert torch.equal(found[HEAD], start) and not torch.equal(found[EMBEDDINGS], start)
    assert config["tie_word_embeddings"] is config["text_config"]["tie_word_embeddings"] is False


def test_policies_of_several_kinds(tiny):
    """One changes both alike, one replaces rows of both, one changes the head alone, one is a whole model."""
    save_adapter(tiny / "sft", tiny / "one", 1, **TIED["low-rank"])
    save_adapter(tiny / "sft", tiny / "two", 2, **TIED["rows"])
    save_adapter(tiny / "sft", tiny / "three", 3, **APART["low-rank-head"])
    weights = (0.2, 0.3, 0.4, 0.1)
    merge("sft", ["one", "two", "three", "first"], "0.2,0.3,0.4,0.1", alpha=0.5, beta=0.5, out="out")
    start, moved = matrices("sft"), [matrices("sft", name) for name in ("one", "two", "three")] + [matrices("first")]
    found = matrices("out")
    for name in (HEAD, EMBEDDINGS):
        exact = start[name] + 0.5 * sum(w * (part[name] - start[name]) for w, part in zip(weights, moved, strict=True))
        assert torch.allclose(found[name], exact, rtol=1e-6, atol=1e-7), name


def test_a_head_with_values_of_its_own_is_not_tied_whatever_the_config_says(tiny):
    config = json.loads((tiny / "sft/config.json").read_text())
    tensors = load_file("sft/model.safetensors")
    save_file(tensors | {HEAD: tensors[EMBEDDINGS] + 1}, "sft/model.safetensors", {"format": "pt"})
    (tiny / "sft/config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    save_two(tiny, **APART["low-rank"])
    merge("sft", ["one", "two"], 0.3, alpha=0.5, beta=0.5, as_="full", out="out")
    check("sft", ["one", "two"], (0.3, 0.7), "out")
    # transformers does not tie what differs.
    for said in ({}, {"tie_word_embeddings": True}):
        rest = {key: value for key, value in config.items() if key != "tie_word_embeddings"}
        (tiny / "sft/config.json").write_text(json.dumps(rest | said))
        (result,) = merge("sft", ["one", "two"], 0.3, alpha=0.5, beta=0.5, as_="full", out=f"said-{len(said)}")
        assert not any("two in the output" in note for note in result.notes)
        assert (tiny / "out/model.safetensors").read_bytes() == (result.out / "model.safetensors").read_bytes()


def test_a_file_may_have_the_tied_tensor_under_the_name_of_the_head(tiny):
    tensors = load_file("sft/model.safetensors")
    save_file({HEAD if name == EMBEDDINGS else name: value for name, value in tensors.items()}, "sft/model.safetensors")
    save_two(tiny, **APART["low-rank-embeddings"])
    for as_ in ("adapter", "full"):
        merge("sft", ["one", "two"], 0.3, alpha=0.5, beta=0.5, as_=as_, out=as_)
        check("sft", ["one", "two"], (0.3, 0.7), as_, adapter=as_ == "adapter")


def test_engines_that_hold_the_tied_base_refuse_untied_merges(tiny):
    save_two(tiny, **APART["low-rank"])
    plan = plan_merge("sft", {"one": "one", "two": "two"})
    with pytest.raises(UserError, match="the head has weights of its own"):
        load_generator("hf", "sft", GenerationSpec(max_tokens=4), [], plan=plan)
    save_two(tiny, **TIED["low-rank"])
    assert plan_merge("sft", {"one": "one", "two": "two"}).fits_base()


def test_rows_of_several_tokens_become_rows_of_all(tiny):
    save_adapter(tiny / "sft", tiny / "one", 1, trainable_token_indices=[7, 3])
    save_adapter(tiny / "sft", tiny / "two", 2, trainable_token_indices={"embed_tokens": [3, 299]})
    save_adapter(tiny / "sft", tiny / "three", 3)
    for as_ in ("adapter", "full"):
        merge("sft", ["one", "two", "three"], "0.2,0.5,0.3", alpha=0.5, beta=0.5, as_=as_, out=as_)
        check("sft", ["one", "two", "three"], (0.2, 0.5, 0.3), as_, adapter=as_ == "adapter")
    assert settings_of(tiny / "adapter")["trainable_token_indices"] == {"model.embed_tokens": [3, 7, 299]}
    with torch.no_grad():
        ours = load_adapter(tiny / "sft", tiny / "adapter")(PROMPT).logits
        assert torch.allclose(ours, AutoModelForCausalLM.from_pretrained("full")(PROMPT).logits, atol=1e-4)


def test_rows_beside_a_whole_embedding_make_no_adapter_but_a_model(tiny):
    save_adapter(tiny / "sft", tiny / "one", 1, **TIED["rows"])
    save_adapter(tiny / "sft", tiny / "two", 2, **APART["modules"])
    with pytest.raises(UserError, match="changed by modules_to_save of one policy and trainable_token_indices"):
        merge("sft", ["one", "two"], 0.3, out="out")
    merge("sft", ["one", "two"], 0.3, alpha=0.5, beta=0.5, as_="full", out="out")
    check("sft", ["one", "two"], (0.3, 0.7), "out")


def test_rows_that_the_settings_do_not_name(tiny):
    save_adapter(tiny / "sft", tiny / "one", 1, **TIED["rows"])
    for tokens, said in (([3, 7], "names 2 tokens"), ([3, 7, 7], "a token twice"), ([3, 7, 300], "tokens up to 300")):
        edit_settings(tiny / "one", trainable_token_indices=tokens)
        with pytest.raises(UserError, match=said):
            merge("sft", ["one"], 1, out="out")


@pytest.mark.parametrize(
    ("reference", "named"),
    [
        ("models/Qwen3-8B", "unsloth/qwen3-8b-unsloth-bnb-4bit"),
        ("models/Llama-3.1-8B", "unsloth/Meta-Llama-3.1-8B-bnb-4bit"),
        ("models/Qwen3-8B", "someone/Qwen3-8B-AWQ"),
    ],
)
def test_adapters_that_name_a_copy_of_the_base(tiny, reference, named):
    save_two(tiny)
    (tiny / "models").mkdir()
    (tiny / "sft").rename(tiny / reference)
    edit_settings(tiny / "one", base_model_name_or_path=reference.replace("models", "Org"))
    edit_settings(tiny / "two", base_model_name_or_path=named)
    (result,) = merge(reference, ["one", "two"], 0.3, alpha=0.5, beta=0.5, out="out")
    assert f"policy `two` names {named} as its base; taken for a copy of {reference}" in result.notes
    check(reference, ["one", "two"], (0.3, 0.7), "out", adapter=True)


def test_adapters_of_different_bases_are_refused_and_the_remedy_works(tiny):
    save_two(tiny)
    edit_settings(tiny / "one", base_model_name_or_path="Org/Model-7B")
    edit_settings(tiny / "two", base_model_name_or_path="Org/Model-7B-Instruct")
    with pytest.raises(UserError, match="name it alike in each adapter_config.json"):
        merge("sft", ["one", "two"], 0.3, out="out")
    edit_settings(tiny / "two", base_model_name_or_path="Org/Model-7B")
    merge("sft", ["one", "two"], 0.3, out="out")


def test_a_quantized_copy_on_this_machine_has_no_values_to_compare(tiny):
    save_two(tiny)
    (tiny / "nf4").mkdir()
    config = json.loads((tiny / "sft/config.json").read_text())
    (tiny / "nf4/model.safetensors").write_bytes(b"not looked at")
    for name in ("one", "two"):
        edit_settings(tiny / name, base_model_name_or_path=str(tiny / "nf4"))
    (tiny / "nf4/config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "nf4"}}))
    (result,) = merge("sft", ["one", "two"], 0.3, out="out")
    assert any("taken for a copy of sft" in note for note in result.notes)
    other = config | {"quantization_config": {"quant_method": "nf4"}, "hidden_size": 65}
    (tiny / "nf4/config.json").write_text(json.dumps(other))
    with pytest.raises(UserError, match="trained from another base"):
        merge("sft", ["one", "two"], 0.3, out="other")

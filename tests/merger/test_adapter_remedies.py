"""What refusals of adapters recommend, carried out: then the merge works."""

import json
import shlex
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_adapters import edit_settings, factors, save_adapter, settings_of
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rewarded_lines import merge
from rewarded_lines.errors import UserError

HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"
TOKENS = 307


def test_dora_is_merged_after_peft_has_folded_it(tiny):
    for seed, name in enumerate(("one", "two"), start=1):
        save_adapter(tiny / "sft", tiny / name, seed, use_dora=True)
    with pytest.raises(UserError, match="merge_and_unload, save that, and merge the full checkpoints"):
        merge("sft", ["one", "two"], 0.3, out="out")
    for name in ("one", "two"):
        whole = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("sft"), name).merge_and_unload()
        whole.save_pretrained(tiny / f"{name}-full")
    merge("sft", ["one-full", "two-full"], 0.3, alpha=0.5, beta=0.5, out="out")
    base, one, two, out = (load_file(f"{name}/model.safetensors") for name in ("sft", "one-full", "two-full", "out"))
    name = "model.layers.3.self_attn.q_proj.weight"
    exact = base[name] + 0.3 * (one[name] - base[name]) + 0.7 * (two[name] - base[name])
    assert torch.allclose(out[name], exact, atol=1e-6) and not torch.equal(out[name], base[name])


def test_a_start_that_changes_the_base_is_converted_by_peft(tiny):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings = {"r": 4, "lora_alpha": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
        model = get_peft_model(
            AutoModelForCausalLM.from_pretrained("sft"), LoraConfig(init_lora_weights="pissa", **settings)
        )
        model.save_pretrained(tiny / "start")
        # PEFT reads it again as a plain start.
        edit_settings(tiny / "start", init_lora_weights=True)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "lora_" in name:
                    weight.add_(0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
        model.save_pretrained(tiny / "raw")
        model.peft_config["default"].init_lora_weights = "pissa"
        model.save_pretrained(tiny / "one", path_initial_model_for_weight_conversion=str(tiny / "start"))
    edit_settings(tiny / "raw", init_lora_weights="pissa")
    with pytest.raises(UserError, match="path_initial_model_for_weight_conversion"):
        merge("sft", ["raw"], 1, out="out")
    merge("sft", ["one"], 1, beta=0, as_="full", out="out")
    expected = model.merge_and_unload().state_dict()
    found = load_file("out/model.safetensors")
    assert all(torch.allclose(found[name], expected[name], atol=1e-5) for name in found)


def test_one_of_several_layers_of_t5_is_kept_apart_in_an_adapter(tiny):
    model = ARCHITECTURES["t5"]()
    model.save_pretrained(tiny / "t5")
    kind = type(model)
    for seed, name in enumerate(("one", "two"), start=1):
        save_adapter(tiny / "t5", tiny / name, seed, kind, target_modules=["shared", "q"], task_type="SEQ_2_SEQ_LM")
    with pytest.raises(UserError, match="pass --as adapter"):
        merge("t5", ["one", "two"], 0.3, as_="full", out="out")
    merge("t5", ["one", "two"], 0.3, beta=0, as_="adapter", out="out")
    loaded = [PeftModel.from_pretrained(kind.from_pretrained("t5"), name) for name in ("one", "two", "out")]
    one, two, out = (model.get_submodule("base_model.model.shared").get_delta_weight("default") for model in loaded)
    assert torch.allclose(out, 0.3 * one + 0.7 * two, atol=1e-6)


def enlarged(tiny, name, seed, rows=1, **settings):
    """Save an adapter of the model with added tokens, whose rows are drawn from `rows`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained("sft")
        torch.manual_seed(rows)
        model.resize_token_embeddings(TOKENS)
        settings = {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **settings}
        model = get_peft_model(model, LoraConfig(init_lora_weights=False, **settings))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for each, weight in model.named_parameters():
                if weight.requires_grad and "lora_" not in each:
                    weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
        model.save_pretrained(tiny / name)


def embeddings(out, as_, start="sft"):
    """Return embeddings and head of a merged model, or of the enlarged base with a merged adapter."""
    if as_ == "full":
        model = AutoModelForCausalLM.from_pretrained(out)
    else:
        base = AutoModelForCausalLM.from_pretrained(start)
        base.resize_token_embeddings(TOKENS)
        model = PeftModel.from_pretrained(base, out).merge_and_unload()
    assert model.config.vocab_size == TOKENS
    return model.get_input_embeddings().weight, model.get_output_embeddings().weight


ADDED = {
    "frozen": {},
    "tied": {"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
    "rows": {"trainable_token_indices": list(range(300, TOKENS))},
}


@pytest.mark.parametrize("kind", list(ADDED))
def test_added_tokens_that_start_alike_in_all_policies(tiny, kind):
    for seed, name in enumerate(("one", "two"), start=1):
        enlarged(tiny, name, seed, **ADDED[kind])
    with pytest.raises(UserError, match="vocabulary is larger than the base's(?s:.)*leave --rank out"):
        merge("sft", ["one", "two"], 0.3, as_="adapter", rank=2, out="out")
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained("sft")
    base.resize_token_embeddings(TOKENS)
    start, parts = base.get_input_embeddings().weight, []
    for name in ("one", "two"):
        file = factors(tiny / name)
        saved = file.get(f"base_model.model.{EMBEDDINGS}", start)
        if kind == "rows":
            rows = file["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"]
            saved = torch.cat([start[:300], rows])
        parts.append(saved - start)
    assert bool(parts[0].any()) == (kind != "frozen")
    exact = start + 0.5 * (0.3 * parts[0] + 0.7 * parts[1])
    for as_ in ("adapter", "full"):
        (result,) = merge("sft", ["one", "two"], 0.3, alpha=0.5, beta=0.5, as_=as_, out=as_)
        assert any("grows from 300 to 307 tokens" in note for note in result.notes)
        for found in embeddings(as_, as_):
            assert torch.allclose(found, exact, atol=1e-6)


def grow(base="sft", rows=TOKENS):
    """Save a base with as many rows as the policies have; the new ones start elsewhere."""
    model = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(9)
    model.resize_token_embeddings(rows)
    model.save_pretrained("grown")
    return load_file("grown/model.safetensors")[EMBEDDINGS]


@pytest.mark.parametrize("kind", ["tied", "rows"])
def test_added_tokens_that_start_apart(tiny, kind):
    for seed, name in enumerate(("one", "two"), start=1):
        enlarged(tiny, name, seed, rows=seed, **ADDED[kind])
    start, parts = grow(), []
    for as_ in ("adapter", "full"):
        with pytest.raises(UserError, match=r"give as base one with as many rows: base.resize_token_embeddings\(307\)"):
            merge("sft", ["one", "two"], 0.3, as_=as_, out="out")
    for name in ("one", "two"):
        file, rows = factors(tiny / name), "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
        whole = file.get(f"base_model.model.{EMBEDDINGS}")
        parts.append((torch.cat([start[:300], file[rows]]) if kind == "rows" else whole) - start)
    exact = start + 0.5 * (0.3 * parts[0] + 0.7 * parts[1])
    for as_ in ("adapter", "full"):
        merge("grown", ["one", "two"], 0.3, alpha=0.5, beta=0.5, as_=as_, out=as_)
        assert all(torch.allclose(found, exact, atol=1e-6) for found in embeddings(as_, as_, "grown"))


def test_added_tokens_that_start_apart_and_stay(tiny):
    """Each policy has learned with its own frozen rows, so none of another base will do."""
    for seed, name in enumerate(("one", "two"), start=1):
        enlarged(tiny, name, seed, rows=seed)
    grow()
    with pytest.raises(UserError, match="the adapter's copy of a base tensor differs from the base's"):
        merge("grown", ["one", "two"], 0.3, as_="full", out="out")


def test_fewer_tokens_than_the_base(tiny):
    """Axolotl and others cut spare rows off."""
    grow()
    Path("grown").rename("sft-again")
    config = json.loads(Path("sft-again/config.json").read_text())
    for seed, name in enumerate(("one", "two"), start=1):
        model = AutoModelForCausalLM.from_pretrained("sft")
        settings = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
        save_adapter(tiny / "sft", tiny / name, seed, **settings)
        edit_settings(tiny / name, base_model_name_or_path="sft-again")
    with pytest.raises(UserError, match=r"base.resize_token_embeddings\(300\)"):
        merge("sft-again", ["one", "two"], 0.3, as_="full", out="out")
    assert config["vocab_size"] == TOKENS and grow("sft-again", model.config.vocab_size).shape[0] == 300
    merge("grown", ["one", "two"], 0.3, as_="full", out="out")


def test_a_head_that_the_base_lacks(tiny):
    """Reward models: the classifier's head is new, as a whole model and beside an adapter."""
    kind = AutoModelForSequenceClassification
    for seed, name in enumerate(("one", "two"), start=1):
        model = kind.from_pretrained("sft", num_labels=1)
        model.get_parameter("score.weight").data += seed
        model.save_pretrained(f"{name}-whole")
        save_adapter(tiny / "sft", tiny / name, seed, kind, task_type="SEQ_CLS")
    asked = r"give as base \w+ForSequenceClassification.from_pretrained\(base, num_labels=(1|2)\), saved"
    heads = {}
    for folder, labels, names in (("whole", 1, ["one-whole", "two-whole"]), ("lora", 2, ["one", "two"])):
        with pytest.raises(UserError, match=asked):
            merge("sft", names, 0.3, out="out", as_="full")
        kind.from_pretrained("sft", num_labels=labels).save_pretrained(f"{folder}-base")
        merge(f"{folder}-base", names, 0.3, alpha=0.5, out=folder, as_="full")
        parts = [load_file(next(Path(name).glob("*model.safetensors"))) for name in names]
        heads = [part.get("score.weight", part.get("base_model.model.score.weight")) for part in parts]
        start, found = (load_file(f"{place}/model.safetensors")["score.weight"] for place in (f"{folder}-base", folder))
        exact = start + 0.5 * (0.3 * (heads[0] - start) + 0.7 * (heads[1] - start))
        assert torch.allclose(found, exact, atol=1e-6)


def test_added_tokens_without_their_start_need_a_base_that_has_them(tiny):
    for seed, name in enumerate(("one", "two"), start=1):
        enlarged(tiny, name, seed, **ADDED["tied"])
        # PEFT leaves the start out if it cannot see the base's config.
        file = factors(tiny / name)
        kept = {key: value for key, value in file.items() if "original_module" not in key and "to_save" not in key}
        save_file(kept, tiny / name / "adapter_model.safetensors", {"format": "pt"})
    for as_ in ("adapter", "full"):
        with pytest.raises(UserError, match="give as base one with as many rows"):
            merge("sft", ["one", "two"], 0.3, as_=as_, out="out")
    base = AutoModelForCausalLM.from_pretrained("sft")
    torch.manual_seed(1)
    base.resize_token_embeddings(TOKENS)
    base.save_pretrained("grown")
    start = load_file("grown/model.safetensors")[EMBEDDINGS]
    parts = [factors(tiny / name)[f"base_model.model.{EMBEDDINGS}"] - start for name in ("one", "two")]
    exact = start + 0.5 * (0.3 * parts[0] + 0.7 * parts[1])
    for as_ in ("adapter", "full"):
        merge("grown", ["one", "two"], 0.3, alpha=0.5, beta=0.5, as_=as_, out=as_)
        assert all(torch.allclose(found, exact, atol=1e-6) for found in embeddings(as_, as_))


def test_a_base_that_differs_otherwise_is_still_another_base(tiny):
    enlarged(tiny, "one", 1, **ADDED["tied"])
    base = AutoModelForCausalLM.from_pretrained("first")
    base.resize_token_embeddings(TOKENS)
    base.save_pretrained("grown")
    with pytest.raises(UserError, match="trained from another base"):
        merge("grown", ["one"], 1, as_="full", out="out")


def test_whole_tensors_need_the_weights_of_the_base(tiny):
    save_adapter(tiny / "sft", tiny / "one", 1, modules_to_save=["norm"])
    (tiny / "bare").mkdir()
    shutil.copy(tiny / "sft/config.json", tiny / "bare")
    with pytest.raises(UserError, match="give a base with its weights"):
        merge("bare", ["one"], 0.5, method="wise-ft", out="out")
    merge("sft", ["one"], 0.5, method="wise-ft", out="out")


def test_fan_in_fan_out_of_a_linear_layer(tiny):
    save_adapter(tiny / "sft", tiny / "one", 1)
    edit_settings(tiny / "one", fan_in_fan_out=True)
    with pytest.raises(UserError, match="set fan_in_fan_out to false"):
        merge("sft", ["one"], 1, as_="full", out="out")
    edit_settings(tiny / "one", fan_in_fan_out=False)
    merge("sft", ["one"], 1, as_="full", out="out")


def test_an_unknown_setting_is_removed_if_it_changes_nothing(tiny):
    save_adapter(tiny / "sft", tiny / "one", 1)
    edit_settings(tiny / "one", a_new_setting=[1])
    with pytest.raises(UserError, match="remove the key if it does not"):
        merge("sft", ["one"], 1, out="out")
    settings = settings_of(tiny / "one")
    del settings["a_new_setting"]
    (tiny / "one/adapter_config.json").write_text(json.dumps(settings))
    merge("sft", ["one"], 1, out="out")


def test_a_whole_model_and_an_adapter_make_a_whole_model(tiny):
    save_adapter(tiny / "sft", tiny / "one", 1)
    with pytest.raises(UserError, match="pass --as full"):
        merge("sft", ["one", "first"], 0.3, as_="adapter", out="out")
    merge("sft", ["one", "first"], 0.3, as_="full", out="out")
    with pytest.raises(UserError, match="pass --as full to fold the adapters.* --rank 64"):
        merge("sft", ["one"], method="ties", lam=1, as_="adapter", out="ties")
    merge("sft", ["one"], method="ties", lam=1, as_="full", out="ties")


def test_a_module_that_one_policy_replaces_and_another_adapts(tiny):
    config = json.loads((tiny / "sft/config.json").read_text())
    tensors = load_file("sft/model.safetensors")
    save_file(tensors | {HEAD: tensors[EMBEDDINGS].clone()}, "sft/model.safetensors", {"format": "pt"})
    (tiny / "sft/config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    save_adapter(tiny / "sft", tiny / "one", 1, modules_to_save=["lm_head"])
    save_adapter(tiny / "sft", tiny / "two", 2, target_modules=["lm_head", "q_proj"])
    with pytest.raises(UserError, match="changed by modules_to_save of one policy and target_modules of another"):
        merge("sft", ["one", "two"], 0.3, out="out")
    merge("sft", ["one", "two"], 0.3, as_="full", out="out")


def test_a_base_that_was_released_in_eight_bits(tiny):
    """The command in the refusal gives the values from which the policies were trained."""
    config, values = json.loads(Path("sft/config.json").read_text()), load_file("sft/model.safetensors")
    small = {}
    for name, value in values.items():
        step = value.abs().max() / 448
        if "proj" in name:
            small[f"{name}_scale_inv"] = step.reshape(1, 1)
            value = (value / step).to(torch.float8_e4m3fn)
        small[name] = value
    quantization = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    Path("fp8").mkdir()
    Path("fp8/config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    save_file(small, "fp8/model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="dequantize it as the policies' trainer did") as caught:
        merge("fp8", ["first"], 1, out="out")
    exec(caught.value.problems[0].remedy.partition('python -c "')[2].removesuffix('"'))
    start = load_file("fp8-dequantized/model.safetensors")
    for name, value in values.items():
        step = small.get(f"{name}_scale_inv")
        wanted = value if step is None else small[name].to(torch.float32) * step
        assert torch.allclose(start[name].float(), wanted.float(), rtol=1e-2)
    merge("fp8-dequantized", ["first"], 0.5, method="wise-ft", out="out")


def test_adapters_on_top_of_another_adapter(tiny, cli):
    """DPO after SFT, both with LoRA: the first adapter is folded into its base as the error says."""
    save_adapter(tiny / "sft", tiny / "stage one", 7)
    for seed, name in enumerate(("one", "two"), start=1):
        save_adapter(tiny / "sft", tiny / name, seed)
        edit_settings(tiny / name, base_model_name_or_path=str(tiny / "stage one"))
    said = []
    for base, kind in (("sft", "adapter"), ("stage one", "adapter"), ("stage one", "full")):
        with pytest.raises(UserError, match="fold it into the model that it was trained on") as caught:
            merge(base, ["one", "two"], 0.3, as_=kind, out="out")
        said += [problem.remedy.partition("rewarded-lines ")[2] for problem in caught.value.problems]
    assert {part.replace(f"{tiny}/", "") for part in said} == {said[-1].replace(f"{tiny}/", "")}
    assert cli(*shlex.split(said[-1])).code == 0
    merge("stage one-full", ["one", "two"], 0.3, as_="full", out="out")
    base = AutoModelForCausalLM.from_pretrained("sft")
    exact = PeftModel.from_pretrained(base, "stage one").merge_and_unload().state_dict()
    found = AutoModelForCausalLM.from_pretrained("stage one-full").state_dict()
    assert all(torch.allclose(found[name], value, atol=1e-6) for name, value in exact.items())

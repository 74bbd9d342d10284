"""Adapters merged into adapters and folded into the base, against PEFT and the formula in float64."""

import json
import shutil

import pytest
import torch
from architectures import ARCHITECTURES, CAUSAL
from peft import PeftModel
from peft.tuners.lora.config import MontecloraConfig, VeloraConfig
from safetensors.torch import load_file, save_file
from tiny_adapters import changes, edit_settings, factors, load_adapter, save_adapter, settings_of
from tiny_models import make_model, make_tokenizer, perturb, save_model, snapshot
from transformers import AutoModelForCausalLM

from rewarded_lines import merge
from rewarded_lines.errors import UserError
from rewarded_lines.merger.lines_schedule import lines_scale

PROMPT = torch.tensor([[1, 5, 9, 33, 120]])
MLP = ["up_proj", "down_proj"]
PREFIX = "base_model.model."


def scale_of(name, alpha, beta, blocks=4):
    block = next((int(part) for part in name.split(".") if part.isdigit()), None)
    return lines_scale(block, blocks, alpha, beta)


def check_sum(tiny, policies, weights, out, alpha=1.0, beta=1.0, base="sft", blocks=4):
    """The merged adapter changes each matrix by Σ s·λᵢ·scalingᵢ·Bᵢ·Aᵢ, to float32 rounding of its B."""
    parts = [changes(load_adapter(tiny / base, tiny / policy)) for policy in policies]
    merged = load_adapter(tiny / base, out)
    found = changes(merged)
    assert set(found) == set().union(*parts)
    for name, change in found.items():
        scale = scale_of(name, alpha, beta, blocks)
        terms = [scale * weight * part[name] for weight, part in zip(weights, parts, strict=True) if name in part]
        size = sum(term.abs().max() for term in terms)
        assert (change - sum(terms)).abs().max() <= 4 * 2.0**-24 * size, name
    return merged


@pytest.fixture
def two(tiny):
    """Two adapters that differ in rank, scaling, patterns and targets."""
    save_adapter(tiny / "sft", tiny / "plain", 1)
    save_adapter(
        *(tiny / "sft", tiny / "mixed", 2),
        r=3,
        lora_alpha=5,
        use_rslora=True,
        target_modules=["q_proj", *MLP],
        rank_pattern={"up_proj": 5, r"layers\.[12]\.mlp\.down_proj": 2},
        alpha_pattern={"^model.layers.0.self_attn.q_proj": 11, "mlp.up_proj": 7},
    )
    return tiny


def test_the_merged_adapter_is_the_weighted_sum(two):
    results = merge("sft", ["plain", "mixed"], ["0.3", "0.8"], alpha=0.5, beta=1.0, out="out")
    for result, lam in zip(results, (0.3, 0.8), strict=True):
        merged = check_sum(two, ["plain", "mixed"], (lam, round(1 - lam, 12)), result.out, 0.5, 1.0)
        own = merged.peft_config["default"]
        assert (own.r, own.lora_alpha, own.use_rslora) == (7, 7, False)
    record = json.loads((two / "out/lam=0.30/merge.json").read_text())
    assert record["as"] == "adapter" and record["weights"] == {"plain": 0.3, "mixed": 0.7}
    assert set(record["policies"]["mixed"]["files"]) == {"adapter_model.safetensors", "adapter_config.json"}
    assert "PeftModel" in (two / "out/lam=0.30/README.md").read_text()


def test_the_forward_pass_is_that_of_peft(two):
    merge("sft", ["plain", "mixed"], 0.4, out="out")
    merged = load_adapter(two / "sft", two / "out").double()
    parts = [changes(load_adapter(two / "sft", two / policy)) for policy in ("plain", "mixed")]
    dense = AutoModelForCausalLM.from_pretrained("sft").double().eval()
    with torch.no_grad():
        for name, layer in dense.named_modules():
            for weight, part in zip((0.4, 0.6), parts, strict=True):
                if name in part:
                    layer.weight += scale_of(name, 1, 1) * weight * part[name]
        assert torch.allclose(merged(PROMPT).logits, dense(PROMPT).logits, rtol=1e-6, atol=1e-6)


def test_a_base_of_a_config_alone_is_enough(two):
    (two / "bare").mkdir()
    shutil.copy(two / "sft/config.json", two / "bare")
    for name in ("plain", "mixed"):
        edit_settings(two / name, base_model_name_or_path=str(two / "bare"))
    merge("sft", ["plain", "mixed"], 0.3, out="full")
    merge("bare", ["plain", "mixed"], 0.3, out="out")
    assert (two / "out/adapter_model.safetensors").read_bytes() == (two / "full/adapter_model.safetensors").read_bytes()
    assert (two / "out/adapter_config.json").read_bytes() == (two / "full/adapter_config.json").read_bytes()


def test_a_quantized_base_is_no_obstacle_to_an_adapter(two):
    (two / "nf4").mkdir()
    config = json.loads((two / "sft/config.json").read_text()) | {
        "quantization_config": {"quant_method": "bitsandbytes"}
    }
    (two / "nf4/config.json").write_text(json.dumps(config))
    (two / "nf4/model.safetensors").write_bytes(b"not looked at")
    merge("nf4", ["plain", "mixed"], 0.3, out="out")
    with pytest.raises(UserError, match="quantized"):
        merge("nf4", ["plain", "mixed"], 0.3, as_="full", out="full")


@pytest.mark.parametrize(("lam", "name"), [(1, "plain"), (0, "mixed")])
def test_endpoints_repeat_the_adapter_bit_for_bit(two, lam, name):
    merge("sft", ["plain", "mixed"], lam, beta=0, out="out")
    merged, policy = factors(two / "out"), factors(two / name)
    assert set(merged) == set(policy)
    assert all(torch.equal(merged[key].view(torch.int32), policy[key].view(torch.int32)) for key in policy)
    assert settings_of(two / "out") == settings_of(two / name)


def test_permuting_the_policies_changes_no_bit(two):
    save_adapter(two / "sft", two / "third", 3, r=2, target_modules=["q_proj"])
    merge("sft", ["plain", "mixed", "third"], "0.2,0.5,0.3", out="one")
    merge("sft", ["third", "plain", "mixed"], "0.3,0.2,0.5", out="other")
    assert (two / "one/adapter_model.safetensors").read_bytes() == (
        two / "other/adapter_model.safetensors"
    ).read_bytes()
    assert settings_of(two / "one") == settings_of(two / "other")
    check_sum(two, ["plain", "mixed", "third"], (0.2, 0.5, 0.3), two / "one")


def test_what_has_no_weight_takes_no_rank(two):
    merge("sft", ["plain", "mixed"], 1, beta=1, out="out")
    assert settings_of(two / "out")["r"] == 4
    merge("sft", ["plain", "mixed"], 0.5, alpha=0, out="late")
    assert not [name for name in factors(two / "late") if ".layers.0." in name]
    merge("sft", ["plain", "mixed"], 0.5, alpha=0, beta=0, out="zero")
    assert all(not change.any() for change in changes(load_adapter(two / "sft", two / "zero")).values())
    assert settings_of(two / "zero")["r"] == 1


def test_embeddings_and_head_as_targets(tiny):
    for seed, name in enumerate(("one", "two")):
        save_adapter(tiny / "sft", tiny / name, seed, r=3 + seed, target_modules=["embed_tokens", "lm_head", "o_proj"])
    (result,) = merge("sft", ["one", "two"], 0.3, out="out")
    assert any("copy of the base's" in note for note in result.notes)
    merged = check_sum(tiny, ["one", "two"], (0.3, 0.7), tiny / "out")
    assert any("embed_tokens.lora_embedding_A" in name for name, _ in merged.named_parameters())


def test_conv1d_of_gpt2(tiny):
    save_model(CAUSAL["gpt2"](), tiny / "gpt2")
    for seed, name in enumerate(("one", "two")):
        save_adapter(tiny / "gpt2", tiny / name, seed, target_modules=["c_attn", "c_proj", "wpe"])
    merge("gpt2", ["one", "two"], 0.3, out="out")
    check_sum(tiny, ["one", "two"], (0.3, 0.7), tiny / "out", base="gpt2", blocks=3)
    merge("gpt2", ["one", "two"], 0.3, as_="full", out="full")
    check_full(tiny, ["one", "two"], (0.3, 0.7), "full", base="gpt2", blocks=3)


@pytest.mark.parametrize("name", ["qwen3", "phi3", "gpt-neox", "opt", "falcon", "gpt2-reward", "t5", "bert", "clip"])
def test_families_against_peft(tiny, name):
    """For every linear layer: PEFT's weighted sum of two adapters, its merge into the base, and ours."""
    model = ARCHITECTURES[name]()
    model.save_pretrained(tiny / name)
    kind = type(model)
    for seed in (1, 2):
        save_adapter(*(tiny / name, tiny / f"{seed}", seed), kind, r=seed, target_modules="all-linear", task_type=None)
    merge(name, ["1", "2"], 0.3, beta=0, out="out")
    merge(name, ["1", "2"], 0.3, beta=0, as_="full", out="full")
    theirs = PeftModel.from_pretrained(kind.from_pretrained(name), "1", adapter_name="1")
    theirs.load_adapter("2", "2")
    theirs.add_weighted_adapter(["1", "2"], [0.3, 0.7], "sum", combination_type="cat")
    theirs.set_adapter("sum")
    expected = theirs.merge_and_unload().state_dict()
    ours = PeftModel.from_pretrained(kind.from_pretrained(name), "out").merge_and_unload().state_dict()
    folded = kind.from_pretrained("full").state_dict()
    for key, value in expected.items():
        for found in (ours[key], folded[key]):
            assert torch.allclose(found, value, rtol=1e-5, atol=2e-7), key
    assert sum(not torch.equal(value, model.state_dict()[key]) for key, value in expected.items()) >= 12


def check_full(tiny, policies, weights, out, base="sft", blocks=4, alpha=1.0, beta=1.0):
    """The folded model is base + Σ s·λᵢ·scalingᵢ·Bᵢ·Aᵢ in float64, rounded once."""
    start, merged = (AutoModelForCausalLM.from_pretrained(tiny / name) for name in (base, out))
    parts = [changes(load_adapter(tiny / base, tiny / policy)) for policy in policies]
    for name, layer in merged.named_modules():
        terms = [
            scale_of(name, alpha, beta, blocks) * weight * part[name]
            for weight, part in zip(weights, parts, strict=True)
            if name in part
        ]
        if terms:
            change = sum(terms).T if type(layer).__name__ == "Conv1D" else sum(terms)
            exact = start.get_submodule(name).weight.detach().double() + change
            wrong = (layer.weight.double() - exact).abs()
            assert (wrong <= exact.abs() * 2.0**-24 * (1 + 2.0**-18) + 1e-12).all(), name
        elif "weight" in layer._parameters:
            assert torch.equal(layer.weight, start.get_submodule(name).weight), name
    return merged


def test_folding_equals_the_formula_and_peft(two):
    merge("sft", ["plain", "mixed"], 0.3, as_="full", out="out")
    check_full(two, ["plain", "mixed"], (0.3, 0.7), "out")
    merge("sft", ["mixed"], 1, beta=0, as_="full", out="alone")
    theirs = load_adapter(two / "sft", two / "mixed").merge_and_unload().state_dict()
    ours = AutoModelForCausalLM.from_pretrained("alone").state_dict()
    assert all(torch.allclose(ours[name], theirs[name], rtol=2.0**-22, atol=2.0**-24) for name in theirs)


def test_folded_adapters_and_whole_models_take_every_method(two):
    adapter = load_adapter(two / "sft", two / "mixed").merge_and_unload()
    save_model(adapter, two / "mixed-full")
    for method in ("ties", "dare-ties", "slerp", "consensus"):
        merge("sft", ["first", "mixed"], 0.3, method=method, out=f"folded-{method}")
        merge("sft", ["first", "mixed-full"], 0.3, method=method, out=f"full-{method}")
        folded, full = (load_file(two / f"{kind}-{method}/model.safetensors") for kind in ("folded", "full"))
        if method != "dare-ties":
            # Residuals differ in their last bits, so a few values may cross a threshold.
            far = sum((~torch.isclose(folded[key], full[key], rtol=1e-5, atol=1e-6)).sum() for key in full)
            assert far <= 50, method
    assert json.loads((two / "folded-ties/merge.json").read_text())["as"] == "full"


def test_a_raw_sum_of_adapters_is_an_adapter_and_other_methods_name_as_full(two):
    merge("sft", ["plain", "mixed"], "0.25,0.75", method="sum", out="sum")
    merge("sft", ["plain", "mixed"], "0.333333333333,1", method="task-arithmetic", out="weighted")
    one, other = (load_file(two / name / "adapter_model.safetensors") for name in ("sum", "weighted"))
    assert one.keys() == other.keys()
    assert all(torch.allclose(one[key], other[key], rtol=1e-6, atol=0) for key in one)
    merge("sft", ["plain", "mixed"], method="sum", beta=0, as_="full", out="whole")
    check_full(two, ["plain", "mixed"], (1.0, 1.0), "whole", beta=0)
    for method in ("ram", "ram-plus", "sce", "della", "breadcrumbs"):
        with pytest.raises(UserError, match="gives no adapter(.|\n)*sum(.|\n)*pass --as full"):
            merge("sft", ["plain", "mixed"], method=method, out="none")


def test_alpha_auto_is_the_same_folded_and_not(two):
    results = [
        merge("sft", ["plain", "mixed"], 0.3, alpha="auto", as_=kind, out=kind)[0].spec.alpha
        for kind in ("adapter", "full")
    ]
    assert results[0] == pytest.approx(results[1], rel=1e-12)


def untied(tiny):
    model = CAUSAL["llama"]()
    save_model(model, tiny / "untied")
    return tiny


def test_embeddings_and_head_that_are_not_tied_are_folded(tiny):
    untied(tiny)
    for seed, name in enumerate(("one", "two")):
        save_adapter(tiny / "untied", tiny / name, seed, target_modules=["embed_tokens", "lm_head", "q_proj"])
    merge("untied", ["one", "two"], 0.3, as_="full", out="out")
    check_full(tiny, ["one", "two"], (0.3, 0.7), "out", base="untied", blocks=3)


def test_modules_to_save_are_merged_like_tensors(tiny):
    untied(tiny)
    save_adapter(tiny / "untied", tiny / "one", 1, modules_to_save=["lm_head"])
    save_adapter(tiny / "untied", tiny / "two", 2, modules_to_save=["lm_head", "embed_tokens"])
    save_adapter(tiny / "untied", tiny / "three", 3)
    weights = (0.2, 0.5, 0.3)
    merge("untied", ["one", "two", "three"], "0.2,0.5,0.3", alpha=0.5, out="out")
    check_sum(tiny, ["one", "two", "three"], weights, tiny / "out", alpha=0.5, base="untied", blocks=3)
    merge("untied", ["one", "two", "three"], "0.2,0.5,0.3", alpha=0.5, as_="full", out="full")
    base, full = (load_file(tiny / f"{name}/model.safetensors") for name in ("untied", "full"))
    files = [factors(tiny / name) for name in ("one", "two", "three")]
    loaded = load_adapter(tiny / "untied", tiny / "out")
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        key = PREFIX + name
        saved = [(weight, file[key]) for weight, file in zip(weights, files, strict=True) if key in file]
        terms = [weight * (value.double() - base[name].double()) for weight, value in saved]
        exact = base[name].double() + 0.5 * sum(terms)
        for found in (factors(tiny / "out")[key], full[name]):
            assert ((found.double() - exact).abs() <= exact.abs() * 2.0**-24 * (1 + 2.0**-20) + 1e-15).all()
        module = loaded.get_submodule(key.removesuffix(".weight"))
        assert torch.equal(module.modules_to_save["default"].weight, factors(tiny / "out")[key])
    merge("untied", ["one", "two"], 0, beta=0, out="end")
    assert all(torch.equal(value, files[1][key]) for key, value in factors(tiny / "end").items())
    merge("untied", ["one", "two"], 0, beta=0, as_="full", out="end-full")
    assert torch.equal(load_file("end-full/model.safetensors")["lm_head.weight"], files[1][PREFIX + "lm_head.weight"])


def test_trained_biases(tiny):
    save_model(CAUSAL["gpt2"](), tiny / "gpt2")
    save_adapter(tiny / "gpt2", tiny / "one", 1, target_modules=["c_attn"], bias="all")
    save_adapter(tiny / "gpt2", tiny / "two", 2, target_modules=["c_attn", "c_fc"], bias="lora_only")
    merge("gpt2", ["one", "two"], 0.3, beta=0, out="out")
    merge("gpt2", ["one", "two"], 0.3, beta=0, as_="full", out="full")
    ours = load_adapter(tiny / "gpt2", tiny / "out").merge_and_unload()
    full = AutoModelForCausalLM.from_pretrained("full")
    base = AutoModelForCausalLM.from_pretrained("gpt2")
    for name, value in full.state_dict().items():
        assert torch.allclose(ours.state_dict()[name], value, rtol=1e-5, atol=1e-6), name
    moved = [name for name, value in base.state_dict().items() if not torch.equal(value, full.state_dict()[name])]
    assert any(name.endswith("ln_f.bias") for name in moved) and any(name.endswith("c_fc.bias") for name in moved)


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_adapters_of_sixteen_bits(tiny, kind):
    dtype = getattr(torch, kind)
    for seed, name in enumerate(("one", "two")):
        save_adapter(tiny / "sft", tiny / name, seed, dtype=dtype, r=4, lora_alpha=4)
    merge("sft", ["one", "two"], 0.3, out="out")
    check_sum(tiny, ["one", "two"], (0.3, 0.7), tiny / "out")
    assert {value.dtype for value in factors(tiny / "out").values()} == {torch.float32}
    merge("sft", ["one", "two"], 0.5, beta=0, out="half")
    check_sum(tiny, ["one", "two"], (0.5, 0.5), tiny / "half", beta=0)
    exact = {value.dtype for value in factors(tiny / "half").values()}
    assert exact == ({torch.bfloat16} if kind == "bfloat16" else {torch.float32})
    merge("sft", ["one", "two"], 1, beta=0, out="end")
    assert all(torch.equal(value, factors(tiny / "one")[key]) for key, value in factors(tiny / "end").items())
    merge("sft", ["one", "two"], 0.3, dtype=kind, out="narrow")
    assert {value.dtype for value in factors(tiny / "narrow").values()} == {dtype}


def test_a_sixteen_bit_base_keeps_its_type_when_folded(tiny):
    save_model(make_model(0).bfloat16(), tiny / "sft16")
    save_adapter(tiny / "sft", tiny / "one", 1)
    edit_settings(tiny / "one", base_model_name_or_path="sft16")
    merge("sft16", ["one"], 1, as_="full", out="out")
    assert {value.dtype for value in load_file("out/model.safetensors").values()} == {torch.bfloat16}


def test_some_blocks_only(tiny):
    (tiny / "bare").mkdir()
    shutil.copy(tiny / "sft/config.json", tiny / "bare")
    for seed, name in enumerate(("one", "two")):
        save_adapter(tiny / "sft", tiny / name, seed, layers_to_transform=[1, 2 + seed])
    for base in ("sft", "bare"):
        merge(base, ["one", "two"], 0.3, out=f"{base}-out")
        check_sum(tiny, ["one", "two"], (0.3, 0.7), tiny / f"{base}-out")


def test_patterns_of_the_output_match_one_module_each(tiny):
    ranks = {"layers.1.self_attn.q_proj": 2, "layers.3.self_attn.v_proj": 6}
    save_adapter(tiny / "sft", tiny / "one", 1, rank_pattern=ranks)
    save_adapter(tiny / "sft", tiny / "two", 2)
    merge("sft", ["one", "two"], 0.3, out="out")
    check_sum(tiny, ["one", "two"], (0.3, 0.7), tiny / "out")
    own = settings_of(tiny / "out")
    assert own["r"] == 10 and len(own["rank_pattern"]) == 7 and own["alpha_pattern"] == own["rank_pattern"]


def test_adapters_and_whole_models_together_give_a_whole_model(two):
    merge("sft", ["plain", "first"], 0.5, out="out")
    assert (two / "out/model.safetensors").is_file()
    with pytest.raises(UserError, match="a whole model: no adapter"):
        merge("sft", ["plain", "first"], 0.5, as_="adapter", out="other")


@pytest.mark.parametrize("method", ["wise-ft", "task-arithmetic", "uniform", "greedy"])
def test_linear_methods_stay_adapters(two, method):
    policies = ["plain"] if method == "wise-ft" else ["plain", "mixed"]
    lam = {"wise-ft": 0.5, "task-arithmetic": "1,1"}.get(method)
    score = (lambda folder: float((folder / "adapter_config.json").is_file())) if method == "greedy" else None
    (result,) = merge("sft", policies, lam, method=method, score=score, beta=0, out="out")
    check_sum(two, policies, result.spec.weights, two / "out", beta=0)


def test_the_replayed_merge_has_the_same_bits(two, cli):
    merge("sft", ["plain", "mixed"], 0.3, out="out")
    assert cli("merge", "--from", "out/merge.json", "--out", "again").code == 0
    assert factors_bytes(two / "again") == factors_bytes(two / "out")
    edit_settings(two / "plain", lora_alpha=7)
    assert "plain" in cli("merge", "--from", "out/merge.json", "--out", "third").err


def factors_bytes(folder):
    return (folder / "adapter_model.safetensors").read_bytes(), (folder / "adapter_config.json").read_bytes()


def test_tokenizer_goes_along_and_inputs_stay(two):
    make_tokenizer().save_pretrained(two / "mixed")
    before = snapshot(two)
    merge("sft", ["plain", "mixed"], 0.5, out="out")
    assert (two / "out/tokenizer.json").read_bytes() == (two / "mixed/tokenizer.json").read_bytes()
    assert {name: content for name, content in snapshot(two).items() if not name.startswith("out")} == before
    (result,) = merge("sft", ["plain", "mixed"], 0.5, out="dry", dry_run=True)
    assert result.out is None and result.bytes > 0 and not (two / "dry").exists()


def test_values_that_are_not_finite(two):
    values = factors(two / "plain")
    name = PREFIX + "model.layers.2.self_attn.v_proj.lora_B.weight"
    values[name][3, 1] = float("nan")
    save_file(values, two / "plain/adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="1 values are not finite in policy `plain`"):
        merge("sft", ["plain", "mixed"], 0.5, out="out")
    assert not (two / "out").exists()
    merge("sft", ["plain", "mixed"], 0.5, out="out", allow_nonfinite=True)
    with pytest.raises(UserError, match="not finite in the result"):
        merge("sft", ["mixed"], "1e30", method="task-arithmetic", dtype="float16", out="large")


def test_a_policy_trained_on_another_base_by_record(two):
    (two / "plain/training.json").write_text(json.dumps({"base_hash": "0" * 64}))
    with pytest.raises(UserError, match="trained from another base"):
        merge("sft", ["plain", "mixed"], 0.5, out="out")
    save_model(perturb(make_model(0), 9), two / "moved")
    shutil.rmtree(two / "plain")
    save_adapter(two / "moved", two / "plain", 1)
    with pytest.raises(UserError, match="trained from another base"):
        merge("sft", ["plain", "mixed"], 0.5, out="out")


def test_an_adapter_that_stays_one_is_recorded_with_the_bases_config_alone(two, cli):
    merge("sft", ["plain", "mixed"], 0.3, out="out")
    record = json.loads((two / "out/merge.json").read_text())
    assert list(record["base"]["files"]) == ["config.json"]
    assert set(record["policies"]["plain"]["files"]) == {"adapter_model.safetensors", "adapter_config.json"}
    # So the merge can be repeated without the weights.
    (two / "sft/model.safetensors").unlink()
    assert cli("merge", "--from", "out", "--out", "again").code == 0
    assert factors_bytes(two / "again") == factors_bytes(two / "out")


def test_an_adapter_of_a_second_copy_of_the_embeddings_unties_the_two(tiny):
    untied(tiny)
    folder = tiny / "untied"
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    save_adapter(folder, tiny / "head", 1, target_modules=["lm_head", "q_proj"])
    config = json.loads((folder / "config.json").read_text())
    # In transformers, a config without `tie_word_embeddings` is tied.
    del config["tie_word_embeddings"]
    (folder / "config.json").write_text(json.dumps(config))
    (result,) = merge("untied", ["head"], as_="full", out="out")
    assert any("two in the output" in note for note in result.notes)
    check_full(tiny, ["head"], (1.0,), "out", base="untied", blocks=3)


def test_alpha_auto_with_a_tied_head_and_tensors_saved_whole(tiny):
    for seed, name in enumerate(("one", "two")):
        save_adapter(tiny / "sft", tiny / name, seed, target_modules=["lm_head", "q_proj"], modules_to_save=["norm"])
    (result,) = merge("sft", ["one", "two"], 0.5, alpha="auto", out="out")
    assert result.spec.alpha == pytest.approx(1)


def test_settings_that_earlier_versions_of_peft_do_not_know_are_left_out(tiny):
    for seed, name in enumerate(("one", "two"), start=1):
        save_adapter(tiny / "sft", tiny / name, seed)
    merge("sft", ["one", "two"], 0.3, out="out")
    settings = json.loads((tiny / "out/adapter_config.json").read_text())
    assert not {"target_parameters", "trainable_token_indices"} & settings.keys()


def test_an_adapter_that_nobody_trained(tiny):
    save_adapter(tiny / "sft", tiny / "one", 1)
    values = {name: value * ("lora_A" in name) for name, value in factors(tiny / "one").items()}
    save_file(values, tiny / "one/adapter_model.safetensors", {"format": "pt"})
    for as_ in ("adapter", "full"):
        (result,) = merge("sft", ["one"], 1, as_=as_, out=as_)
        assert "policy `one`: every B is zero, so it changes nothing" in result.notes


@pytest.mark.parametrize("kind", ["orthogonal", "mica", "velora", "monteclora"])
def test_variants_of_training_are_plain_lora(tiny, kind):
    """They start or train otherwise, and compute B·A: values as PEFT folds them, and an adapter that PEFT loads."""
    configs = {"velora": {"velora_config": VeloraConfig()}, "monteclora": {"monteclora_config": MontecloraConfig()}}
    for seed, name in enumerate(("one", "two"), start=1):
        save_adapter(tiny / "sft", tiny / name, seed, **configs.get(kind, {"init_lora_weights": kind}))
    merge("sft", ["one", "two"], 0.3, alpha=0.5, beta=0, as_="full", out="full")
    merge("sft", ["one", "two"], 0.3, alpha=0.5, beta=0, out="out")
    # The whole weight of one policy repeats its file, but no setting that asks for tensors of training.
    merge("sft", ["one", "two"], 1, beta=0, out="same")
    base = AutoModelForCausalLM.from_pretrained("sft").state_dict()
    one, two, full, out, same = (
        AutoModelForCausalLM.from_pretrained(name).state_dict()
        if name == "full"
        else load_adapter("sft", name).merge_and_unload().state_dict()
        for name in ("one", "two", "full", "out", "same")
    )
    for name, start in base.items():
        exact = start + 0.5 * (0.3 * (one[name] - start) + 0.7 * (two[name] - start))
        assert torch.allclose(full[name], exact, atol=1e-6) and torch.allclose(out[name], exact, atol=1e-6)
        assert torch.allclose(same[name], one[name], atol=1e-6)
    assert not torch.equal(
        full["model.layers.0.self_attn.q_proj.weight"], base["model.layers.0.self_attn.q_proj.weight"]
    )

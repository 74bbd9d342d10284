"""Adapters that cannot be merged: one message, exit code 1, nothing written, no input touched."""

import json
import shutil

import pytest
import torch
from architectures import CAUSAL
from safetensors.torch import save_file
from tiny_adapters import edit_settings, factors, save_adapter
from tiny_models import make_model, make_tokenizer, perturb, save_model, snapshot

from rewarded_lines.checkpoints.hashing import weights_hash


@pytest.fixture(scope="module")
def adapted_source(tiny_source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapted")
    for seed, name in enumerate(("one", "two")):
        save_adapter(tiny_source / "sft", folder / name, seed)
    return folder


@pytest.fixture
def adapted(tiny, adapted_source):
    """The tiny project with two adapters of its SFT model."""
    for name in ("one", "two"):
        shutil.copytree(adapted_source / name, tiny / name)
        edit_settings(tiny / name, base_model_name_or_path="sft")
    return tiny


@pytest.fixture
def refused(cli, adapted):
    """Run a merge that must be refused; return its message."""

    def run(*more, base="sft", one="one", two="two"):
        before = snapshot(adapted)
        answer = cli("merge", "--base", base, "--policy", f"one={one}", "--policy", f"two={two}", "--out", "out", *more)
        assert answer.code == 1 and answer.out == "", answer
        assert "Traceback" not in answer.err
        assert snapshot(adapted) == before
        return answer.err

    return run


def test_the_command_line_merges_adapters(cli, adapted):
    args = ("merge", "--base", "sft", "--policy", "one", "--policy", "two", "--lam", 0.3)
    assert cli(*args, "--out", "out").code == 0
    assert (adapted / "out/adapter_model.safetensors").is_file() and not (adapted / "out/model.safetensors").exists()
    assert cli(*args, "--out", "full", "--as", "full").code == 0
    assert (adapted / "full/model.safetensors").is_file()


def test_other_kinds_of_adapter(refused, adapted):
    edit_settings(adapted / "one", peft_type="LOHA")
    edit_settings(adapted / "two", use_dora=True)
    said = refused()
    assert "an adapter of type 'LOHA'" in said and "DoRA" in said and "merge_and_unload" in said


@pytest.mark.parametrize("method", ["ties", "dare", "slerp", "consensus"])
def test_methods_that_give_no_adapter(refused, method):
    said = refused("--method", method)
    assert f"the method {method} gives no adapter" in said and "--as full" in said


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--as", "lora"), "--as: unknown value `lora`"),
        (
            ("--as", "adapter", "--policy", "first", "--lam", "0.2,0.3,0.5"),
            "a whole model: no adapter can store all of its difference from the base",
        ),
    ],
)
def test_kinds_of_output(refused, args, said):
    assert said in refused(*args)


def test_another_base(refused, adapted):
    save_model(perturb(make_model(0), 9), adapted / "moved")
    edit_settings(adapted / "two", base_model_name_or_path=str(adapted / "moved"))
    for kind in ("adapter", "full"):
        said = refused("--as", kind)
        assert "policy `two`" in said and "trained from another base" in said and "moved" in said


def test_bases_by_name(refused, adapted, cli):
    for name, base in (("one", "someone/llama"), ("two", "someone/qwen")):
        edit_settings(adapted / name, base_model_name_or_path=base)
    said = refused()
    assert "the adapters name different bases" in said and "someone/qwen for two" in said
    # What the training of one recorded says nothing of the other's base.
    (adapted / "one/training.json").write_text(json.dumps({"base_hash": weights_hash(adapted / "sft")}))
    assert "the adapters name different bases" in refused()
    (adapted / "one/training.json").unlink()
    for name, base in (("one", "/cluster/a/llama"), ("two", "/cluster/b/llama/")):
        edit_settings(adapted / name, base_model_name_or_path=base)
    assert cli("merge", "--base", "sft", "--policy", "one", "--policy", "two", "--out", "out").code == 0


def test_shapes_and_modules_are_told_at_once(refused, adapted):
    save_model(make_model(0, hidden=128), adapted / "wide")
    save_adapter(adapted / "wide", adapted / "one", 1)
    values = factors(adapted / "two")
    moved = {name.replace("layers.0.self_attn.q_proj", "layers.0.other"): value for name, value in values.items()}
    save_file(moved, adapted / "two/adapter_model.safetensors", {"format": "pt"})
    edit_settings(adapted / "one", base_model_name_or_path="sft")
    for kind in ("adapter", "full"):
        said = refused("--as", kind)
        assert "shape (64, 64) in base, (128, 128) by A and B" in said
        assert "model.layers.0.other is not in the base" in said


def test_shapes_without_the_base_weights(refused, adapted):
    save_model(make_model(0, hidden=128), adapted / "wide")
    save_adapter(adapted / "wide", adapted / "one", 1)
    edit_settings(adapted / "one", base_model_name_or_path="sft")
    (adapted / "sft/model.safetensors").unlink()
    assert "B·A has shape (128, 128) in one, (64, 64) in two" in refused()


def test_another_tokenizer(refused, adapted):
    make_tokenizer().save_pretrained(adapted / "one")
    file = adapted / "one/tokenizer.json"
    content = json.loads(file.read_text())
    content["added_tokens"][0]["content"] = "<other>"
    file.write_text(json.dumps(content))
    assert "the tokenizer differs from the base's" in refused()


def test_added_vocabulary(refused, adapted):
    model = make_model(0)
    model.resize_token_embeddings(310)
    save_model(model, adapted / "grown")
    save_adapter(adapted / "grown", adapted / "one", 1, target_modules=["q_proj", "embed_tokens"])
    edit_settings(adapted / "one", base_model_name_or_path="sft")
    said = refused()
    assert "(300, 64) in base, (310, 64)" in said and "resize_token_embeddings" in said


def test_tensors_saved_whole_need_the_base(refused, adapted):
    save_model(CAUSAL["llama"](), adapted / "untied")
    for seed, name in enumerate(("one", "two")):
        save_adapter(adapted / "untied", adapted / name, seed, modules_to_save=["lm_head"])
    (adapted / "untied/model.safetensors").unlink()
    said = refused(base="untied")
    assert "1 tensors are saved whole (modules_to_save)" in said and "with its weights" in said


def test_adapted_here_and_replaced_there(refused, adapted):
    save_model(CAUSAL["llama"](), adapted / "untied")
    save_adapter(adapted / "untied", adapted / "one", 1, modules_to_save=["lm_head"])
    save_adapter(adapted / "untied", adapted / "two", 2, target_modules=["lm_head"])
    assert "changed by modules_to_save of one policy and target_modules of another" in refused(base="untied")


def test_a_square_matrix_stored_nobody_knows_how(refused, adapted):
    edit_settings(adapted / "one", fan_in_fan_out=True)
    assert "fan_in_fan_out is true" in refused()


def test_a_base_that_is_an_adapter(refused):
    assert "config.json" in refused(base="two")


def test_pickles(refused, adapted):
    (adapted / "one/adapter_model.safetensors").rename(adapted / "one/adapter_model.bin")
    assert "pickled weights are never opened" in refused()


@pytest.mark.parametrize(
    "settings",
    [
        {"base_model_name_or_path": "a\0b"},
        {"base_model_name_or_path": "~nobody/x"},
        {"base_model_name_or_path": "x" * 9000},
        {"base_model_name_or_path": "/dev/null"},
        {"base_model_name_or_path": "\ud800"},
        {"task_type": ["a"], "target_modules": {"x": 1}},
        {"target_modules": [1, None], "layers_to_transform": "x"},
        {"auto_mapping": [[]], "revision": 5},
    ],
)
def test_odd_settings_end_in_a_message_or_in_an_adapter(cli, adapted, settings):
    edit_settings(adapted / "one", **settings)
    answer = cli("merge", "--base", "sft", "--policy", "one", "--policy", "two", "--out", "out")
    assert answer.code in (0, 1) and "Traceback" not in answer.err
    assert (adapted / "out/adapter_config.json").is_file() == (answer.code == 0)


def test_half_precision_that_overflows_is_refused(cli, adapted):
    values = {name: value.to(torch.float16) * 1e4 for name, value in factors(adapted / "one").items()}
    save_file(values, adapted / "one/adapter_model.safetensors", {"format": "pt"})
    args = ("merge", "--base", "sft", "--policy", "one", "--lam", "1", "--alpha", "1000", "--out", "out")
    answer = cli(*args, "--dtype", "float16")
    assert answer.code == 1 and "not finite in the result" in answer.err and not (adapted / "out").exists()
    assert cli(*args).code == 0

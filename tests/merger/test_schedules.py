"""Schedules by policy, by block and by kind of module, through the doors that users have, against plain sums."""

from __future__ import annotations

import json
import re
import shlex

import numpy as np
import pytest
from safetensors.torch import load_file
from tiny_adapters import changes, load_adapter, save_adapter

from rewarded_lines import merge
from rewarded_lines.checkpoints.families import kind_of
from rewarded_lines.kernels.gpu_blocks import DeviceWorkspace
from rewarded_lines.merger.lines_schedule import Line
from rewarded_lines.merger.open_inputs import plan_as
from rewarded_lines.merger.schedule_forms import named_schedules, read_schedule
from rewarded_lines.merger.spec import MergeSpec

WEIGHTS = (0.25, 0.75)
LISTS = {"first": (1.5, 0.0, -0.5, 2.0), "second": (1.0, 0.25, 1.0, 3.0)}
FORMS = {
    "α and β by policy": (
        ["--alpha", "first=0.5", "--beta", "first=2", "--beta", "second=-0.5"],
        lambda policy, block: (0.5 + 2 * block / 3, 1 - 0.5 * block / 3)[policy],
        {},
    ),
    "a list": (["--schedule", "1.5,0,-0.5,2"], lambda policy, block: LISTS["first"][block], {}),
    "lists in a file": (["--schedule", "plan.json"], lambda policy, block: list(LISTS.values())[policy][block], {}),
    "a list and α, by kind": (
        ["--schedule", "second=1,0.25,1,3", "--alpha", "2", "--beta", "0", "--modules", "mlp=0.5,norm=0"],
        lambda policy, block: (2.0, LISTS["second"][block])[policy],
        {"mlp": 0.5, "norm": 0.0},
    ),
}


def scale_of(name, scales, factors, policy):
    """Return s of a tensor of a tiny Llama, told apart by hand."""
    block = int(name.split(".")[2]) if ".layers." in name else 0
    kind = "norm" if "norm" in name else "mlp" if ".mlp." in name else ""
    return scales(policy, block) * factors.get(kind, 1.0)


def values(folder):
    (file,) = folder.glob("*.safetensors")
    return {name: value.double().numpy() for name, value in load_file(file).items()}


@pytest.mark.parametrize("form", FORMS)
def test_each_residual_is_scaled_as_said_and_the_merge_repeats(cli, tiny, form):
    arguments, scales, factors = FORMS[form]
    (tiny / "plan.json").write_text(json.dumps(LISTS))
    assert (answer := cli("merge", "--lam", "0.25", "--out", "out", *arguments)).code == 0, answer.err
    base, *policies = (values(tiny / name) for name in ("sft", "first", "second"))
    for name, value in values(tiny / "out").items():
        moved = [scale_of(name, scales, factors, i) * (one[name] - base[name]) for i, one in enumerate(policies)]
        exact = base[name] + WEIGHTS[0] * moved[0] + WEIGHTS[1] * moved[1]
        np.testing.assert_allclose(value, exact, rtol=2.0**-23, atol=1e-12)
    (tiny / "plan.json").unlink()
    merged = (tiny / "out/model.safetensors").read_bytes()
    assert cli("merge", "--from", "out", "--out", "again").code == 0
    spec = MergeSpec.from_dict(json.loads((tiny / "out/merge.json").read_text()))
    command = spec.command("sft", {"first": "first", "second": "second"}, "by-command")
    assert cli(*shlex.split(command)[1:]).code == 0
    for folder in ("again", "by-command"):
        assert (tiny / folder / "model.safetensors").read_bytes() == merged
        assert MergeSpec.from_dict(json.loads((tiny / folder / "merge.json").read_text())) == spec


@pytest.mark.parametrize("form", ["α and β by policy", "a list and α, by kind"])
def test_stacked_adapters_hold_each_policys_scale(cli, tiny, form):
    arguments, scales, factors = FORMS[form]
    targets = ["q_proj", "down_proj"]
    for seed, name in enumerate(("first", "second")):
        save_adapter(tiny / "sft", tiny / f"lora/{name}", seed, target_modules=targets, modules_to_save=["norm"])
    named = ("--base", "sft", "--policy", "lora/first", "--policy", "lora/second")
    assert (answer := cli("merge", *named, "--lam", "0.25", "--out", "out", *arguments)).code == 0, answer.err
    each = [changes(load_adapter(tiny / "sft", tiny / f"lora/{name}")) for name in ("first", "second")]
    merged = changes(load_adapter(tiny / "sft", tiny / "out"))
    assert {name.rpartition(".")[2] for name in merged} == set(targets)
    for name, change in merged.items():
        place = name[name.index("layers.") :].replace("layers.", "model.layers.", 1)
        parts = [w * scale_of(place, scales, factors, i) for i, w in enumerate(WEIGHTS)]
        exact = parts[0] * each[0][name] + parts[1] * each[1][name]
        np.testing.assert_allclose(change.numpy(), exact.numpy(), rtol=1e-5, atol=1e-6)


def test_lines_as_a_list_is_lines_and_a_factor_of_one_is_nothing(tiny):
    lines = {"alpha": 0.5, "beta": 0.75, "outside": "depth"}
    (tiny / "plan.txt").write_text("\n".join(str(0.5 + 0.75 * block / 3) for block in range(4)))
    merge("sft", ["first", "second"], 0.3, out="lines", **lines)
    merge("sft", ["first", "second"], 0.3, out="listed", schedule="plan.txt", modules={"mlp": 1}, outside="depth")
    assert (tiny / "lines/model.safetensors").read_bytes() == (tiny / "listed/model.safetensors").read_bytes()


def test_where_only_one_policy_is_left_it_is_copied_bit_for_bit(tiny):
    merge("sft", ["first", "second"], 0.5, out="out", schedule={"first": [2, 2, 0, 1], "second": [0, 0, 2, 1]})
    out, first, second = (load_file(tiny / name / "model.safetensors") for name in ("out", "first", "second"))
    for name, value in out.items():
        block = int(name.split(".")[2]) if ".layers." in name else 0
        if block < 3:
            assert value.equal((first, first, second)[block][name])


def test_every_way_of_computing_makes_the_same_bits(tiny):
    plan = plan_as("full", "sft", {"first": "first", "second": "second"}, "soup")
    for method, options in (("soup", {}), ("dare", {"density": 0.5, "seed": 3})):
        lines = (Line(0.3, 0.9), Line(blocks=LISTS["second"]))
        spec = MergeSpec((0.3, 0.7), method=method, options=options, lines=lines)
        there = dict(plan.tensors(spec, workspace=lambda: DeviceWorkspace(plan.base, plan.sources[1:], "cpu")))
        assert all(value.equal(there[name]) for name, value in plan.tensors(spec))
        turned = plan_as("full", "sft", {"second": "second", "first": "first"}, "soup")
        swapped = MergeSpec((0.7, 0.3), method=method, options=options, lines=lines[::-1])
        assert all(value.equal(there[name]) for name, value in turned.tensors(swapped))


def test_a_matched_scale_has_the_norm_of_the_schedule(tiny):
    plan = plan_as("full", "sft", {"first": "first", "second": "second"}, "soup")
    schedule = read_schedule(["first", "second"], schedule=LISTS, modules={"mlp": 0.5})
    base, first, second = (values(tiny / name) for name in ("sft", "first", "second"))
    squares = np.zeros(2)
    for name in base:
        taus = [0.25 * (first[name] - base[name]), 0.75 * (second[name] - base[name])]
        scales = [scale_of(name, lambda i, block: list(LISTS.values())[i][block], {"mlp": 0.5}, i) for i in (0, 1)]
        squares += [((scales[0] * taus[0] + scales[1] * taus[1]) ** 2).sum(), ((taus[0] + taus[1]) ** 2).sum()]
    matched = plan.matched_alpha(WEIGHTS, MergeSpec(WEIGHTS, **schedule))
    assert matched == pytest.approx((squares[0] / squares[1]) ** 0.5, rel=1e-9)


REFUSED = {
    "--schedule 1,2,3": "one coefficient for each block(?s:.)*expected: 4\n *got: 3",
    "--schedule 1,1,1,1 --beta 0": "--beta: this value would decide nothing",
    "--schedule first=1,1,1,1 --alpha first=2": "--alpha: this value would decide nothing(?s:.)*first",
    "--alpha third=1": "--alpha: no policy `third`(?s:.)*first, second",
    "--alpha first=1 --alpha first=2": "--alpha: given twice",
    "--modules mlps=0.5": "did you mean `mlp`",
    "--modules other=0.5": "no tensor of the model is of the kind `other`(?s:.)*attention, ",
    "--schedule 1,,1,1,1": "--schedule: not a finite number",
    f"--schedule {'no,' * 99}": "neither coefficients nor a file",
    "--schedule nowhere.txt": "neither coefficients nor a file",
    "--beta first=much": "--beta: not a finite number",
    "--method ties --beta first=0": "ties is not linear(?s:.)*one of soup",
    "--alpha auto --beta first=0": "auto chooses one α for all policies",
}


def test_what_cannot_be_meant_is_refused_before_it_costs_anything(cli, tiny):
    for arguments, said in REFUSED.items():
        answer = cli("merge", "--lam", "0.5", "--out", "out", *shlex.split(arguments))
        assert answer.code == 1 and re.search(said, answer.err), answer.err
    assert not (tiny / "out").exists()


def test_lists_longer_than_a_files_name_and_names_with_an_equals_sign(cli, tiny):
    answer = cli("inspect", "sft", "--schedule", "lam=0.5=" + ",".join(["1.5" + "0" * 70] * 4), "--json")
    assert answer.code == 0, answer.err
    lines = read_schedule(["lam", "lam=0.5"], schedule=["lam=1,1", "lam=0.5=1,2"])["lines"]
    assert [line.blocks for line in lines] == [(1, 1), (1, 2)]


def test_names_with_commas():
    names = ["a", "b", "a,b", "c=1,d"]
    for text, expected in (("a,b=2,b=3", [9, 3, 2, 9]), ("c=1,d=4, a=5,b=6", [5, 6, 9, 4]), ("9,a,b=2", [9, 9, 2, 9])):
        read = read_schedule(names, alpha=[text, *(["9"] if not text.startswith("9") else [])])
        assert [line.alpha for line in read["lines"]] == expected, text
    assert list(named_schedules("a,b", ("a,b=2,c=3", None, None, None), "alpha")[1]) == ["a,b", "c"]


def test_kinds_are_told_from_names_of_many_families():
    kinds = {
        "attention": "model.layers.0.self_attn.q_proj h.1.attn.c_proj encoder.layer.0.attention.output.dense "
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias transformer.attentions.3.q_lin "
        "backbone.layers.2.mixer.o_proj model.layers.0.linear_attn.conv1d",
        "mlp": "model.layers.0.mlp.experts.3.up_proj h.1.mlp.c_fc encoder.layer.0.output.dense decoder.layers.1.fc2 "
        "model.layers.1.block_sparse_moe.gate encoder.block.0.layer.1.DenseReluDense.wi_0 transformer.ffns.3.lin1",
        "norm": "model.layers.0.self_attn.q_norm h.1.ln_2 transformer.layer_norm1.0 encoder.layer.0.output.LayerNorm",
        "other": "model.layers.0.mamba.in_proj model.layers.0.mixer.A_log",
    }
    found = {name: kind_of(f"{name}.weight", "in") for names in kinds.values() for name in names.split()}
    assert found == {name: kind for kind, names in kinds.items() for name in names.split()}
    outside = {"model.norm": "norm", "lm_head": "head", "score": "head", "wte": "embeddings", "shared": "embeddings"}
    outside |= {"vision_model.embeddings.patch_embedding": "embeddings", "multi_modal_projector.linear_1": "other"}
    assert {name: kind_of(f"{name}.weight", "after") for name in outside} == outside
    assert kind_of("lm_head.weight", "before") == "embeddings"

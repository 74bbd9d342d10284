"""`merge --as adapter --rank`: against numpy's truncated SVD, loaded by PEFT, with what is lost told in numbers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_adapters import changes, load_adapter, save_adapter, settings_of
from tiny_models import perturb

from rewarded_lines import merge
from rewarded_lines.errors import UserError
from rewarded_lines.merger.lines_schedule import lines_scale

SLOW = [
    pytest.param(name, marks=pytest.mark.slow)
    for name in ("qwen2", "qwen3", "qwen2-moe", "gpt-neox", "phi3", "t5", "bert")
]


def tensors(folder):
    folder = Path(folder)
    return {name: one.double().numpy() for name, one in load_file(folder / "model.safetensors").items()}


def block_of(name):
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def merged_residual(parts, weights, alpha=1.0, beta=1.0, blocks=4, base="sft"):
    """s·Σ λᵢτᵢ of every tensor, in float64."""
    origin, policies = tensors(base), [tensors(part) for part in parts]
    return {
        name: lines_scale(block_of(name), blocks, alpha, beta)
        * sum(weight * (policy[name] - one) for weight, policy in zip(weights, policies, strict=True))
        for name, one in origin.items()
    }


def truncated(matrix, rank):
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


def check(found, residual, rank, transposed=False):
    """PEFT's B·A is numpy's truncated SVD of the residual, to float32 rounding of the factors."""
    for name, change in found.items():
        expected = residual[f"{name}.weight"].T if transposed else residual[f"{name}.weight"]
        expected = truncated(expected, rank)
        assert np.abs(change.numpy() - expected).max() <= 1e-6 * np.abs(expected).max(), name


@pytest.mark.parametrize("name", ["gpt2", *SLOW])
def test_families_against_numpy_and_peft(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    model = ARCHITECTURES[name]()
    model.save_pretrained(tmp_path / "sft")
    kind = type(model)
    for seed in (1, 2):
        perturb(kind.from_pretrained("sft"), seed).save_pretrained(tmp_path / f"p{seed}")
    merge("sft", ["p1", "p2"], 0.3, beta=0, as_="adapter", rank=3, out="out")
    merge("sft", ["p1", "p2"], 0.3, beta=0, as_="adapter", rank=9999, out="whole")
    merge("sft", ["p1", "p2"], 0.3, beta=0, as_="full", out="full")
    loaded = PeftModel.from_pretrained(kind.from_pretrained("sft"), "out")
    found = changes(loaded)
    assert settings_of(tmp_path / "out")["fan_in_fan_out"] is (name == "gpt2") and len(found) >= 12
    check(found, merged_residual(["p1", "p2"], [0.3, 0.7], beta=0), 3, transposed=name == "gpt2")
    ours = PeftModel.from_pretrained(kind.from_pretrained("sft"), "whole").merge_and_unload().state_dict()
    full, base = kind.from_pretrained("full").state_dict(), model.state_dict()
    for key, value in ours.items():
        expected = full[key] if key.removesuffix(".weight") in found else base[key]
        assert torch.allclose(value, expected, rtol=1e-5, atol=1e-6), key


def test_what_is_lost_is_told_in_numbers(cli, tiny):
    answer = cli("merge", "--lam", "0.25", "--as", "adapter", "--rank", "5", "--out", "out", "--json")
    (result,) = json.loads(answer.out)
    residual = merged_residual(["first", "second"], [0.25, 0.75])
    check(changes(load_adapter(tiny / "sft", tiny / "out")), residual, 5)
    layers = {name: one for name, one in residual.items() if "_proj" in name}
    held = {name: np.square(truncated(one, 5)).sum() / np.square(one).sum() for name, one in layers.items()}
    inside, total = (sum(np.square(one).sum() for one in some.values()) for some in (layers, residual))
    kept = sum(np.square(truncated(one, 5)).sum() for one in layers.values())
    worst = min(held, key=held.__getitem__)
    expected = [kept / total, kept / inside, 1 - inside / total, held[worst]]
    told = result["kept"]
    assert [told[key] for key in ("kept", "of_matrices", "left_out", "worst")] == pytest.approx(expected, rel=1e-6)
    assert told["worst_matrix"] == worst and 0.01 < told["left_out"] < 0.5
    record = json.loads((tiny / "out/merge.json").read_text())
    assert (record["as"], record["rank"], record["kept"]) == ("adapter", 5, told)
    card = (tiny / "out/README.md").read_text()
    assert f"holds {told['kept']:.2%}".replace("%", "%") in card and "--rank 5" in card and "max_lora_rank=8" in card
    assert any(f"{told['left_out']:.2%} lies in other tensors" in note for note in result["notes"])


def test_any_method_any_input_any_type(tiny):
    save_adapter(tiny / "sft", tiny / "lora", 1)
    how = {"method": "ties", "options": {"density": 0.5}, "alpha": 0.5, "dtype": "bfloat16"}
    merge("sft", ["first", "lora"], 0.4, as_="adapter", rank=64, out="out", **how)
    merge("sft", ["first", "lora"], 0.4, as_="full", out="full", **how | {"dtype": "float32"})
    base, full = tensors(tiny / "sft"), tensors(tiny / "full")
    for name, change in changes(load_adapter(tiny / "sft", tiny / "out")).items():
        expected = full[f"{name}.weight"] - base[f"{name}.weight"]
        # Both factors are rounded to 8 bits.
        assert np.linalg.norm(change.numpy() - expected) <= 2**-7 * np.linalg.norm(expected), name


def test_the_same_bits_again_and_for_any_order_of_policies(tiny):
    shutil.copytree("first", "third")
    merge("sft", ["first", "second", "third"], "0.2,0.5,0.3", as_="adapter", rank=4, out="one")
    merge("sft", ["third", "first", "second"], "0.3,0.2,0.5", as_="adapter", rank=4, out="other")
    from rewarded_lines.merger.merge import replay

    replay("one")
    first = (tiny / "one/adapter_model.safetensors").read_bytes()
    assert all((tiny / f"{name}/adapter_model.safetensors").read_bytes() == first for name in ("other", "one-again"))


@pytest.mark.slow
def test_adapters_of_each_policy_serve_every_weight(tiny):
    """The sum of two adapters is exact; the nearest adapter of a sum is another one."""
    for name in ("first", "second"):
        merge("sft", [name], 1, beta=0, as_="adapter", rank=6, out=f"lora-{name}")
    merge("sft", ["lora-first", "lora-second"], 0.3, beta=0, out="out")
    found = changes(load_adapter(tiny / "sft", tiny / "out"))
    alone = [merged_residual([name], [1], beta=0) for name in ("first", "second")]
    for name, change in found.items():
        expected = sum(w * truncated(one[f"{name}.weight"], 6) for w, one in zip((0.3, 0.7), alone, strict=True))
        assert np.abs(change.numpy() - expected).max() <= 1e-6 * np.abs(expected).max()


def nan(tiny, name="model.layers.1.mlp.up_proj.weight"):
    weights = load_file(tiny / "first/model.safetensors")
    weights[name].view(-1)[3] = float("nan")
    save_file(weights, tiny / "first/model.safetensors", {"format": "pt"})


def nan_in_a_norm(tiny):
    nan(tiny, "model.norm.weight")


def bare(tiny):
    for name in ("sft", "first", "second"):
        weights = load_file(tiny / name / "model.safetensors")
        short = {key.removeprefix("model."): one for key, one in weights.items()}
        save_file(short, tiny / name / "model.safetensors", {"format": "pt"})


def towers(tiny):
    for name in ("sft", "first", "second"):
        path = tiny / name / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"vision_config": {}}))


@pytest.mark.parametrize(
    ("change", "options", "expected"),
    [
        (None, ["--rank", "8"], "pass --as adapter, or leave --rank out"),
        (nan, ["--as", "adapter", "--rank", "8"], "the merged residual is not finite"),
        (nan_in_a_norm, ["--as", "adapter", "--rank", "8"], "1 values are not finite in policy `first`"),
        (bare, ["--as", "adapter", "--rank", "8"], "the file's names lack"),
        (towers, ["--as", "adapter", "--rank", "8"], "a model of several parts"),
    ],
)
def test_what_cannot_be_right_is_refused(cli, tiny, change, options, expected):
    if change:
        change(tiny)
    answer = cli("merge", "--lam", "0.5", "--out", "out", *options)
    assert answer.code == 1 and expected in " ".join(answer.err.split()), answer.err
    assert not (tiny / "out").exists()


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_no_device_is_passed_over_in_silence(cli, tiny, device):
    save_adapter(Path("sft"), Path("third"), 3)
    for policy, words in (("first", ["--as", "adapter", "--rank", 2]), ("third", [])):
        given = ["--base", "sft", "--policy", policy, "--lam", "1", "--out", "out", *words]
        answer = cli("merge", *given, "--device", device)
        assert answer.code == 1 and "adapters are computed on the CPU" in answer.err and not Path("out").exists()
        assert cli("merge", *given, "--device", "auto").code == 0
        shutil.rmtree("out")


def test_a_whole_policy_needs_a_rank_and_a_rank_is_positive(tiny):
    for rank, expected in ((None, "or --rank 64 for the nearest adapter"), (0, "--rank: not a rank")):
        with pytest.raises(UserError, match=expected):
            merge("sft", ["first", "second"], 0.5, as_="adapter", rank=rank, out="out")

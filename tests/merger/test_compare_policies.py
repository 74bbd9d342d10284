"""`inspect` of several policies against numpy: every number is computed in a second way."""

from __future__ import annotations

import json
import shutil
from itertools import combinations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_adapters import save_adapter

from rewarded_lines import inspect
from rewarded_lines.kernels import thread_pool
from rewarded_lines.merger import compare_policies
from rewarded_lines.merger.compare_policies import RANKS
from rewarded_lines.reports.comparison_tables import implications

SHAPES = {
    "model.embed_tokens.weight": (30, 8),
    "model.layers.0.mlp.up_proj.weight": (40, 30),
    "model.layers.0.norm.weight": (8,),
    "model.layers.1.mlp.up_proj.weight": (20, 90),
    "model.layers.2.mlp.up_proj.weight": (20, 90),
    "model.layers.2.self_attn.q_proj.weight": (9, 9),
    "model.norm.weight": (8,),
}


def write(folder, tensors, shards=1):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 3}))
    files = {name: f"m{index % shards}.safetensors" for index, name in enumerate(tensors)}
    for file in set(files.values()) if shards > 1 else ["model.safetensors"]:
        save_file({name: one for name, one in tensors.items() if files[name] == file or shards == 1}, folder / file)
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return folder


def policies_of(base, dtype=torch.float32, count=3):
    """Each policy changes a third of the values; one tensor of the first stays."""
    made = []
    for seed in range(1, 1 + count):
        rng = np.random.default_rng(seed)
        steps = {n: rng.normal(0, 0.5, s) * (rng.random(s) < 1 / 3) for n, s in SHAPES.items()}
        made.append({n: (base[n].double() + torch.from_numpy(steps[n])).to(dtype) for n in SHAPES})
    made[0]["model.norm.weight"] = base["model.norm.weight"].clone()
    return made


def base_of(dtype=torch.float32):
    rng = np.random.default_rng(0)
    return {name: torch.from_numpy(rng.normal(0, 1, shape)).to(dtype) for name, shape in SHAPES.items()}


@pytest.fixture
def three(tmp_path, request, short_blocks):
    """A base, three policies of it, and their residuals in float64 by numpy."""
    dtype = getattr(request, "param", torch.float32)
    base = base_of(dtype)
    made = policies_of(base, dtype)
    folders = [write(tmp_path / name, tensors) for name, tensors in zip("abc", made, strict=True)]
    residuals = [{n: (one[n].double() - base[n].double()).numpy() for n in SHAPES} for one in made]
    return write(tmp_path / "sft", base), folders, residuals, base, made


def flat(residual, names):
    return np.concatenate([residual[name].ravel() for name in names])


def check(found, residuals, names):
    taus = [flat(one, names) for one in residuals]
    masks = np.array([tau != 0 for tau in taus])
    assert (found.values, found.changed) == (taus[0].size, int(masks.any(axis=0).sum()))
    for i, tau in enumerate(taus):
        assert found.both[i, i] == masks[i].sum() and found.alone[i] == (masks[i] & (masks.sum(axis=0) == 1)).sum()
        assert found.norm(i) == pytest.approx(np.linalg.norm(tau), rel=1e-13)
    for i, j in combinations(range(3), 2):
        both, either = masks[i] & masks[j], masks[i] | masks[j]
        assert found.overlap(i, j) == (both.sum() / either.sum() if either.any() else None)
        same = (np.sign(taus[i]) == np.sign(taus[j])) & both
        assert found.agreement(i, j) == (same.sum() / both.sum() if both.any() else None)
        size = np.linalg.norm(taus[i]) * np.linalg.norm(taus[j])
        expected = pytest.approx(taus[i] @ taus[j] / size, abs=1e-13) if size else None
        assert found.cosine(i, j) == expected


@pytest.mark.parametrize("three", [torch.float32, torch.bfloat16], indirect=True)
def test_counts_signs_and_cosines_of_tensors_blocks_and_the_whole(three):
    base, folders, residuals, _, _ = three
    found = inspect(folders, base)
    assert list(found.policies) == ["a", "b", "c"] and list(found.tensors) == list(SHAPES)
    for name, one in found.tensors.items():
        check(one, residuals, [name])
    check(found.total, residuals, list(SHAPES))
    blocks = [(block, one) for (_, block, _), one in found.levels.items()]
    assert [block for block, _ in blocks] == [None, 0, 1, 2, None]
    for block, one in blocks[1:4]:
        check(one, residuals, [name for name in SHAPES if f".{block}." in name])
    assert found.tensors["model.norm.weight"].cosine(0, 1) is None


def test_energies_are_those_of_the_singular_values(three):
    base, folders, residuals, _, _ = three
    found = inspect(folders, base, spectra="all")
    kinds = {"up_proj": [f"model.layers.{block}.mlp.up_proj.weight" for block in range(3)]}
    kinds |= {"q_proj": ["model.layers.2.self_attn.q_proj.weight"], "embed_tokens": ["model.embed_tokens.weight"]}
    kinds[""] = [name for names in kinds.values() for name in names]
    assert found.spectra.keys() == kinds.keys() and sorted(found.measured) == sorted(kinds[""])
    for kind, names in kinds.items():
        for policy, residual in zip("abc", residuals, strict=True):
            squares = [np.linalg.svd(residual[name], compute_uv=False) ** 2 for name in names]
            total = sum(one.sum() for one in squares)
            held = [sum(one[:rank].sum() for one in squares) / total for rank in RANKS]
            assert found.spectra[kind].held[policy] == pytest.approx(held, rel=1e-12)
            stable = np.median([one.sum() / one[0] for one in squares])
            assert found.spectra[kind].stable_rank[policy] == pytest.approx(stable, rel=1e-12)


def test_the_same_bits_for_any_sharding_and_any_threads(three, tmp_path, monkeypatch):
    base, folders, _, tensors, made = three
    first = inspect(folders, base, spectra="none")
    moved = [write(tmp_path / f"shards-{index}", one, 3) for index, one in enumerate([tensors, *made])]
    monkeypatch.setattr(thread_pool, "cores", lambda: 5)
    again = inspect(dict(zip("abc", moved[1:], strict=True)), moved[0], spectra="none")
    assert again.spectra == {} and again.policies.keys() == first.policies.keys()
    for name, one in first.tensors.items():
        assert all(np.array_equal(value, getattr(again.tensors[name], key)) for key, value in vars(one).items())


def test_a_sample_takes_blocks_evenly_spaced_over_depth(three, monkeypatch):
    base, folders, _, _, _ = three
    ends = ["model.layers.0.mlp.up_proj.weight", "model.layers.2.mlp.up_proj.weight"]
    costs = sum(compare_policies.cost(SHAPES[name]) for name in [*ends, "model.layers.2.self_attn.q_proj.weight"])
    monkeypatch.setattr(compare_policies, "_BUDGET", 3 * costs + 1)
    found = inspect(folders, base)
    assert found.measured == [*ends, "model.layers.2.self_attn.q_proj.weight"] and found.matrices == 5
    assert "in 3 of 5 matrices" in implications(found)
    monkeypatch.setattr(compare_policies, "_BUDGET", 1)
    assert inspect(folders, base).spectra == {}


def test_an_adapter_beside_a_whole_policy_has_its_rank(tiny):
    save_adapter(tiny / "sft", tiny / "lora", 1)
    found = inspect(["first", "lora"], "sft")
    held = found.spectra["q_proj"].held
    assert held["lora"][1:] == pytest.approx([1, 1, 1], abs=1e-12) and held["first"][1] < 0.9
    up = found.tensors["model.layers.0.mlp.up_proj.weight"]
    assert up.share(1) == 0 and up.cosine(0, 1) is None and up.agreement(0, 1) is None
    alone = inspect("lora", "sft").total.residual
    assert (found.total.norm(1), found.total.share(1)) == (pytest.approx(alone.norm, rel=1e-13), alone.share_changed)


def parts(kind):
    """Two residuals as fractions of a random one."""
    first = {name: np.random.default_rng(7).normal(0, 1, shape) for name, shape in SHAPES.items()}
    rows = {name: np.arange(one.size).reshape(one.shape) % 2 == 0 for name, one in first.items()}
    second = {
        "same": {name: 3 * one for name, one in first.items()},
        "opposite": {name: -one for name, one in first.items()},
        "disjoint": {name: one * ~rows[name] for name, one in first.items()},
    }[kind]
    return ({name: one * rows[name] for name, one in first.items()} if kind == "disjoint" else first), second


@pytest.mark.parametrize(
    ("kind", "said", "unsaid"),
    [
        (
            "same",
            ["cosine of the residuals is 1.00", "one line", "3.0 times as far", "RAM has nothing"],
            ["oppose each"],
        ),
        ("opposite", ["oppose each other", "100% of all changed values", "change much", "soup has 0.00 times"], []),
        ("disjoint", ["RAM averages almost nothing", "nearly orthogonal", "0.71 times"], ["signs agree"]),
    ],
)
def test_the_paragraph_says_what_the_figures_imply(tmp_path, kind, said, unsaid):
    base = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    folders = [
        write(tmp_path / name, {key: torch.from_numpy(one) for key, one in residual.items()})
        for name, residual in zip("ab", parts(kind), strict=True)
    ]
    text = implications(inspect(folders, write(tmp_path / "sft", base)))
    assert all(part in text for part in said), text
    assert not any(part in text for part in unsaid), text


def test_through_the_command_line(cli, tiny):
    tensors = load_file(tiny / "first/model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, tiny / "first/model.safetensors", {"format": "pt"})
    content = json.loads(cli("inspect", "--base", "sft", "first", "second", "--json", "--plot", "both.svg").out)
    found = inspect(["first", "second"], "sft")
    shutil.copytree("second", "third")
    assert "nan " not in implications(inspect(["first", "second", "third"], "sft", spectra="none"))
    block = content["levels"][1]
    assert block["pairs"][0]["cosine"] == found.levels["model.layers", 0, "in"].cosine(0, 1)
    assert block["policies"]["first"]["changed"] == found.levels["model.layers", 0, "in"].both[0, 0]
    assert content["total"]["pairs"][0]["cosine"] is None and content["total"]["nonfinite"] == 1
    assert content["spectra"]["all"]["held"]["first"][3] == found.spectra[""].held["first"][3]
    assert "tensors" not in content and content["implications"] == implications(found)
    assert (tiny / "both.svg").read_bytes().startswith(b"<?xml")
    shown = cli("inspect", "--base", "sft", "first", "second", "--tensors", "--spectra", "none")
    assert shown.code == 0 and max(map(len, shown.out.splitlines())) <= 120
    assert "not finite: 1 values of model.norm.weight" in shown.out and "same sign" in shown.out


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["first", "second"], "pass --base with the SFT model"),
        (["first", "second", "--base", "sft", "--alpha", "0.5"], "scales are shown for a single checkpoint"),
        (["first", "--base", "sft", "--spectra", "all"], "measured for several policies"),
    ],
)
def test_mistakes_are_refused(cli, tiny, args, expected):
    answer = cli("inspect", *args)
    assert answer.code == 1 and answer.out == "" and expected in " ".join(answer.err.split())

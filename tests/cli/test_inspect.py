"""`rewarded-lines inspect` through the command line."""

import json
import re
import sys

import pytest
from safetensors.torch import load_file, save_file

from rewarded_lines import inspect, merge


def rows(text):
    return [line.split() for line in text.splitlines() if line]


def test_the_table_without_a_base(cli, tiny):
    answer = cli("inspect", "first")
    assert answer.code == 0 and answer.err == ""
    table = rows(answer.out)
    assert ["block", "tensors", "parameters", "type", "s"] in table
    assert ["before", "1", "19,200", "F32", "1"] in table
    assert ["1", "9", "41,088", "F32", "1.333"] in table
    assert ["after", "1", "64", "F32", "1"] in table
    assert ["total", "38", "183,616", "F32"] in table
    assert "model.layers: 4 blocks" in answer.out and "before the blocks: model.embed_tokens" in answer.out


def test_the_table_with_a_base(cli, tiny):
    answer = cli("inspect", "first", "--base", "sft", "--alpha", "0.5")
    level = inspect("first", "sft", alpha=0.5).levels[4]
    assert level.block == 3
    row = next(row for row in rows(answer.out) if row[0] == "3")
    residual = level.residual
    assert row[4:] == [
        "1.5",
        f"{residual.norm:#.4g}",
        f"{100 * residual.relative:#.3g}%",
        "100%",
        f"{residual.scaled_norm:#.4g}",
    ]


@pytest.mark.parametrize("options", [(), ("--base", "sft"), ("--tensors",), ("--base", "sft", "--tensors")])
def test_it_fits_80_columns(narrow, tiny, options):
    answer = narrow("inspect", "first", *options)
    assert answer.code == 0 and max(map(len, answer.out.splitlines())) <= 80


def test_every_tensor(cli, tiny):
    table = rows(cli("inspect", "first", "--tensors", "--base", "sft").out)
    norms = {one.name: f"{one.residual.norm:#.4g}" for one in inspect("first", "sft").tensors}
    name = "model.layers.2.mlp.up_proj.weight"
    assert ["2", name, "128×64", "F32", "1.667", norms[name]] in table
    assert len([row for row in table if len(row) > 1 and row[1].endswith(".weight")]) == len(norms) == 38


def test_values_the_base_shares_are_not_changed(cli, tiny):
    tensors = load_file(tiny / "sft/model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, tiny / "first/model.safetensors", {"format": "pt"})
    table = rows(cli("inspect", "first", "--base", "sft").out)
    assert next(row for row in table if row[0] == "0")[5:] == ["0", "0%", "0%", "0"]
    assert next(row for row in table if row[0] == "after")[7] == "1.6%"
    # One of 183,616: small, but not zero.
    assert next(row for row in table if row[0] == "total")[6] == "0.1%"


def test_a_merged_folder_names_its_parents(cli, tiny):
    cli("merge", "--lam", "0.3", "--out", "merged")
    assert "merged by soup: λ 0.3 first, λ 0.7 second; α = 1, β = 1" in cli("inspect", "merged").out


def test_json_is_clean_on_stdout(cli, tiny):
    answer = cli("inspect", "first", "--base", "sft", "--json", "--plot", "depth.svg")
    content = json.loads(answer.out)
    assert content["stacks"] == {"model.layers": 4} and "tensors" not in content
    assert [level["block"] for level in content["levels"]] == [None, 0, 1, 2, 3, None]
    assert content["levels"][1]["residual"]["norm"] == inspect("first", "sft").levels[1].residual.norm
    assert 0 < content["total"]["residual"]["relative"] < 1
    assert len(json.loads(cli("inspect", "first", "--json", "--tensors").out)["tensors"]) == 38


def test_json_has_null_for_what_is_not_finite(cli, tiny):
    tensors = load_file(tiny / "first/model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, tiny / "first/model.safetensors", {"format": "pt"})
    content = json.loads(cli("inspect", "first", "--base", "sft", "--json").out)
    assert content["total"]["residual"]["norm"] is None and content["total"]["residual"]["nonfinite"] == 1
    assert "not finite: 1 values of model.norm.weight" in cli("inspect", "first", "--base", "sft").out


def test_names_from_a_file_do_not_steer_the_terminal(cli, tiny):
    merge("sft", {"\x1b[2J[red]first": "first"}, 1, out="merged")
    answer = cli("inspect", "merged")
    assert answer.code == 0 and "\x1b" not in answer.out and r"λ 1 \x1b[2J[red]first" in answer.out


@pytest.mark.parametrize(("file", "magic"), [("d.png", b"\x89PNG"), ("d.svg", b"<?xml"), ("d.PDF", b"%PDF")])
def test_plot(cli, tiny, file, magic):
    pytest.importorskip("matplotlib")
    answer = cli("inspect", "first", "--base", "sft", "--plot", file)
    assert answer.code == 0 and answer.out.rstrip().endswith(f"figure: {file}")
    assert (tiny / file).read_bytes().startswith(magic)
    assert not list(tiny.glob(".d.*"))


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("d.jpg", "d.jpg: no format of a figure"),
        ("depth", "got: no ending"),
        ("d.sgv", "did you mean `svg`?"),
        ("no/d.png", "its folder is not there"),
    ],
)
def test_a_figure_that_cannot_be_is_refused_before_the_work(cli, tiny, file, expected):
    answer = cli("inspect", "nothing-there", "--plot", file)
    assert answer.code == 1 and expected in answer.err and "nothing-there" not in answer.err


def test_without_matplotlib_the_extra_is_named_before_the_work(cli, tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    answer = cli("inspect", "nothing-there", "--plot", "d.png")
    assert answer.code == 1 and 'pip install "rewarded-lines[report]"' in answer.err
    assert cli("inspect", "first").code == 0


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (("none",), "none: no such folder|none: neither a folder"),
        (("first", "--base", "other"), "other: no such folder|other: neither a folder"),
        (("first", "--alpha", "nan"), "--alpha: not a finite number"),
        (("first", "--outside", "dept"), "did you mean `depth`"),
        (("first", "--layers", "x"), "the pattern has no group"),
    ],
)
def test_mistakes_are_told_in_one_message(cli, tiny, args, expected):
    answer = cli("inspect", *args)
    assert answer.code == 1 and answer.out == "" and re.search(expected, answer.err)

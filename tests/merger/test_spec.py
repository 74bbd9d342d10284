"""The numbers of a merge: in files and in the command that makes it; weights from text, and grids of them."""

from __future__ import annotations

import json
import math
import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewarded_lines.errors import UserError
from rewarded_lines.merger.methods import METHODS
from rewarded_lines.merger.spec import MergeSpec, folder_name, parse_weights, simplex_grid

POLICIES = {"helpful": "runs/helpful", "b": "org/brief"}


@pytest.mark.parametrize("method", METHODS)
def test_json_holds_it_whole(method):
    spec = MergeSpec((0.3, 0.7), 0.5, 0.25, method, outside="depth")
    spec = spec.complete(METHODS[method].policies or 2)
    assert MergeSpec.from_dict(json.loads(json.dumps(spec.as_dict(["a", "b"])))) == spec
    assert hash(spec) == hash(MergeSpec.from_dict(spec.as_dict(["a", "b"])))


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (MergeSpec((0.3, 0.7)), "--lam 0.3"),
        (MergeSpec((0.3, 0.7), 1.0, 0.0), "--lam 0.3 --beta 0"),
        (MergeSpec((1 / 3, 2 / 3)), f"--lam {1 / 3!r},{2 / 3!r}"),
        (MergeSpec((2.0, -1.0)), "--lam 2 --extrapolate"),
        (MergeSpec((1.0, 1.0), method="task-arithmetic"), "--lam 1,1 --method task-arithmetic"),
        (MergeSpec((0.5, 0.5), method="uniform", outside="depth"), "--method uniform --outside depth"),
        (
            MergeSpec((0.5, 0.5), 0.7, method="dare", options={"density": 0.1, "seed": 3}),
            "--lam 0.5 --alpha 0.7 --method dare --density 0.1 --seed 3",
        ),
    ],
)
def test_the_command_names_what_differs_from_the_default(spec, words):
    named = "--policy runs/helpful --policy b=org/brief"
    assert spec.command("sft", POLICIES) == f"rewarded-lines merge --base sft {named} {words} --out merged"


def test_the_command_says_how_it_is_written():
    how = {"dtype": "bfloat16", "as_": "full", "layers": None, "max_shard_size": "2GB"}
    command = MergeSpec((1.0,), 0.3, 0.7).command("my sft", {"lam=0.5": "runs/lam=0.5"}, "out", **how)
    assert shlex.split(command)[2:] == [
        *("--base", "my sft", "--policy", "lam-0.5=runs/lam=0.5", "--alpha", "0.3", "--beta", "0.7"),
        *("--dtype", "bfloat16", "--as", "full", "--max-shard-size", "2GB", "--out", "out"),
    ]


def test_options_are_checked_and_filled_in():
    assert MergeSpec((), method="ties", options={"density": 0.5}).complete(2).options["join"] == "mean"
    with pytest.raises(UserError, match="not an option of soup"):
        MergeSpec((), options={"density": 0.5}).complete(2)


def test_one_number_means_the_first_of_two():
    assert parse_weights("0.9", ["a", "b"]) == (0.9, 0.1)
    assert parse_weights("1", ["a"]) == (1.0,)
    # A policy that is itself a merge of three, named after its folder.
    assert parse_weights("lam=0.2,0.3,0.5=0.4,b=0.6", ["lam=0.2,0.3,0.5", "b"]) == (0.4, 0.6)
    assert parse_weights("0.2,0.3,0.5", ["a", "b", "c"]) == (0.2, 0.3, 0.5)


@pytest.mark.parametrize(
    ("text", "policies", "message"),
    [
        ("1.5", "ab", "outside 0 to 1"),
        ("0.2,0.3,0.5", "ab", "3 weights for 2 policies"),
        ("0.2,0.3", "ab", "do not sum to 1"),
        ("half", "ab", "not a weight"),
        ("nan", "ab", "not a weight"),
        ("0.5", "abc", "1 weights for 3 policies"),
    ],
)
def test_weights_that_are_refused(text, policies, message):
    with pytest.raises(UserError, match=message):
        parse_weights(text, list(policies))


def test_extrapolation_is_asked_for():
    assert parse_weights("1.5", ["a", "b"], extrapolate=True) == (1.5, -0.5)


@given(st.integers(1, 4), st.integers(2, 7))
def test_simplex_grid(policies, points):
    grid = simplex_grid(policies, points)
    assert len(grid) == len(set(grid)) == math.comb(points - 1 + policies - 1, policies - 1)
    assert all(math.isclose(sum(weights), 1) and min(weights) >= 0 for weights in grid)
    assert all(tuple(float(i == corner) for i in range(policies)) in grid for corner in range(policies))


def test_two_policies_go_along_lambda():
    assert simplex_grid(2, 3) == [(0.0, 1.0), (0.5, 0.5), (1.0, 0.0)]


def test_folder_names():
    assert folder_name((0.5, 0.5)) == "lam=0.50"
    assert folder_name((0.2, 0.3, 0.5)) == "lam=0.20,0.30,0.50"
    assert folder_name((1 / 3, 2 / 3)) != folder_name((0.33, 0.67))


def test_folders_of_many_policies_have_names_that_file_systems_take():
    assert folder_name((1 / 14,) * 14) == "lam=equal" and folder_name((1 / 3,) * 3).startswith("lam=0.333")
    first, *others = (folder_name((weight,) * 14) for weight in (1 / 7, 1 / 13, 1 / 21))
    assert len({first, "lam=equal", *others}) == 4 and len(first) < 30

"""The numbers of a merge: what they are in files, and the command that makes the merge."""

from __future__ import annotations

import json
import shlex

import pytest

from rewarded_lines.errors import UserError
from rewarded_lines.merger.methods import METHODS
from rewarded_lines.merger.spec import MergeSpec

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

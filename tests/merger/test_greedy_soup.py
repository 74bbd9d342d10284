"""Greedy model soup: its members, scores by function or command, and scores that fail."""

from __future__ import annotations

import json
import shlex
import sys

import numpy as np
import pytest
from exact import FLOAT32
from hostile import SHAPES, load_codes
from tiny_models import snapshot

from rewarded_lines import merge
from rewarded_lines.errors import UserError
from rewarded_lines.merger.greedy_soup import choose_greedily

THIRD = 1 / 3


@pytest.fixture
def family(families):
    return families((FLOAT32,) * 4, gentle=True)


def scores(family, values):
    """Return a score that recognises soups by their values; an unknown soup is an error."""
    base, *policies = ({name: family.values(name)[row] for name in SHAPES} for row in range(4))

    def mean(members, name):
        return base[name] + sum(policies[int(member[1]) - 1][name] - base[name] for member in members) / len(members)

    soups = {members: {name: mean(members, name) for name in SHAPES} for members in values}

    def score(folder):
        codes, _ = load_codes(folder)
        found = {name: codes[name].view(np.float32).ravel() for name in SHAPES}
        for members, soup in soups.items():
            if all(np.allclose(found[name], soup[name].astype(np.float32), rtol=1e-6, atol=0) for name in SHAPES):
                return values[members]
        raise AssertionError("a soup that was not expected")

    return score


def greedy(family, score, out, **more):
    return merge(family.base, family.policies, method="greedy", score=score, out=out, beta=0, **more)[0]


ALONE = {("p1",): 1.0, ("p2",): 3.0, ("p3",): 2.0}
JOINED = [
    # Best first: p3 lowers the score and is left out, p1 joins.
    ({("p2", "p3"): 2.9, ("p1", "p2"): 3.5}, (0.5, 0.5, 0.0)),
    # An equal score is enough.
    ({("p2", "p3"): 3.0, ("p1", "p2", "p3"): 3.0}, (THIRD, THIRD, THIRD)),
    # No candidate improves the score.
    ({("p2", "p3"): 2.999, ("p1", "p2"): 2.0}, (0.0, 1.0, 0.0)),
    # p1 with the two others must reach the score of those two, not that of the best alone.
    ({("p2", "p3"): 4.0, ("p1", "p2", "p3"): 3.9}, (0.0, 0.5, 0.5)),
]


@pytest.mark.parametrize(("together", "expected"), JOINED)
def test_who_joins(together, expected, family, tmp_path):
    result = greedy(family, scores(family, ALONE | together), tmp_path / "out")
    assert result.spec.weights == expected
    record = json.loads((tmp_path / "out/merge.json").read_text())
    assert tuple(record["weights"].values()) == expected
    assert "score of p2: 3" in record["notes"] and len(record["notes"]) == 3 + len(together)
    codes, _ = load_codes(tmp_path / "out")
    if expected == (0.0, 1.0, 0.0):
        assert all(np.array_equal(codes[name], family.codes[2][name]) for name in SHAPES)


def test_ties_go_in_the_users_order():
    seen = []

    def score(members):
        seen.append(members)
        return 1.0 if len(members) == 1 else -len(members)

    assert choose_greedily(3, score) == [0]
    assert seen == [(0,), (1,), (2,), (0, 1), (0, 2)]


def test_candidates_have_the_schedule_of_the_output(family, tmp_path):
    """The last soup that was scored and accepted equals the output in every byte, also with automatic α."""
    for alpha in (0.3, "auto"):
        seen = []

        def score(folder, seen=seen):
            seen.append((folder / "model.safetensors").read_bytes())
            assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"
            return len(seen)

        common = {"method": "greedy", "alpha": alpha, "beta": 0.8, "score": score}
        (result,) = merge(family.base, family.policies, out=tmp_path / str(alpha), **common)
        assert result.spec.weights == (THIRD, THIRD, THIRD) and len(seen) == 5
        assert (result.out / "model.safetensors").read_bytes() == seen[-1]


SCORE = """\
import json, pathlib, sys


def favourite(folder):
    header = (folder / "model.safetensors").read_bytes()
    return float(sum(header[-4000:]) % 97)


def broken(folder):
    raise ValueError("no data")


def nothing(folder):
    return float("nan")


if __name__ == "__main__":
    print("loading", sys.argv[1])
    print(favourite(pathlib.Path(sys.argv[1])))
"""


@pytest.fixture
def project(family, tmp_path, monkeypatch):
    """A working directory with a score, and the arguments of a greedy merge."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "score.py").write_text(SCORE)
    policies = [part for name, path in family.policies.items() for part in ("--policy", f"{name}={path}")]
    return ("merge", "--base", family.base, *policies, "--method", "greedy")


def test_function_and_command_agree(cli, project, tmp_path):
    python = shlex.quote(sys.executable)
    doors = ["score.py:favourite", f"{python} score.py", f"{python} score.py {{model}}"]
    for index, score in enumerate(doors):
        answer = cli(*project, "--score", score, "--out", tmp_path / str(index), "--json")
        assert answer.code == 0, answer.err
        assert sum(json.loads(answer.out)[0]["weights"].values()) == pytest.approx(1)
    written = {(tmp_path / str(index) / "model.safetensors").read_bytes() for index in range(3)}
    assert len(written) == 1
    said = cli(*project, "--score", doors[0], "--out", tmp_path / "again").out
    assert "score of p1" in said


@pytest.mark.parametrize(
    ("score", "expected"),
    [
        (None, "the greedy soup needs a score"),
        ("score.py:broken", "ValueError: no data"),
        ("score.py:nothing", "got: nan"),
        ("score.py:favorite", "did you mean `favourite`?"),
        ("nowhere.py:favourite", "no such file"),
        ("false", "exit code 1"),
        ("no-such-program-anywhere {model}", "No such file"),
        ("echo several words", "the score gave no number"),
        ("true", "the score gave no number"),
    ],
)
def test_scores_that_give_no_number(score, expected, cli, project, tmp_path):
    before = snapshot(tmp_path)
    answer = cli(*project, *(("--score", score) if score else ()), "--out", tmp_path / "out")
    assert answer.code == 1 and "Traceback" not in answer.err
    assert expected in " ".join(answer.err.split())
    after = snapshot(tmp_path)
    assert {name: what for name, what in after.items() if not name.endswith(".lock")} == before


def test_weights_are_not_the_users(family, tmp_path):
    with pytest.raises(UserError, match="sets the weights itself"):
        merge(
            family.base, family.policies, (0.2, 0.3, 0.5), method="greedy", score=lambda folder: 1, out=tmp_path / "out"
        )


def test_equal_scores_do_not_depend_on_the_order_of_policies(family, tmp_path):
    equal = {("p1",): 1.0, ("p2",): 1.0, ("p3",): 1.0, ("p1", "p2"): 0.5, ("p1", "p3"): 0.5}
    for turn in (list(family.policies.items()), list(family.policies.items())[::-1]):
        out = tmp_path / turn[0][0]
        result = merge(family.base, dict(turn), method="greedy", score=scores(family, equal), out=out, beta=0)[0]
        assert dict(zip(result.names, result.spec.weights, strict=True)) == {"p1": 1.0, "p2": 0.0, "p3": 0.0}

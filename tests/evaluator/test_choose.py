"""`choose` by hand on invented scores; its command makes the very policy that was evaluated."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from rewarded_lines import choose, sweep
from rewarded_lines.cli import app
from rewarded_lines.engines.load_engine import load_generator
from rewarded_lines.errors import UserError
from rewarded_lines.evaluator.points import PointSpec
from rewarded_lines.evaluator.recorded_choices import CHOICES_FILE, recorded_choices
from rewarded_lines.evaluator.records import (
    FORMAT,
    Point,
    load_run,
    point_path,
    write_point,
)
from rewarded_lines.folders import write_json
from rewarded_lines.merger.spec import MergeSpec, parse_weights
from rewarded_lines.projects import load_project

# The SFT model's scores deviate from their mean by 1 in `a` and by 10 in `b`.
DEVIATIONS = {"a": 1.0, "b": 10.0, "c": 1.0}
PROMPTS = 8
SOUP = {0.0: (0.0, 30.0), 0.5: (2.0, 25.0), 1.0: (4.0, 0.0)}
LINES = {0.0: (0.5, 28.0), 0.5: (3.0, 18.0), 1.0: (3.5, -5.0)}


def invented(folder, points, audits=(), policies=("first", "second")):
    """Write a run whose points have exactly these means."""
    points = {PointSpec("sft"): (0.0,) * len(next(iter(points.values()))), **points}
    names = list(DEVIATIONS)[: len(points[PointSpec("sft")])]
    swing = np.array([-1.0, 1.0] * (PROMPTS // 2))
    keys = [f"{index:016x}" for index in range(len(points))]
    for key, (spec, means) in zip(keys, points.items(), strict=True):
        write_point(
            point_path(folder, key),
            Point(
                spec=spec,
                prompts=[f"prompt {index}" for index in range(PROMPTS)],
                responses=["one two"] * PROMPTS,
                prompt_index=np.arange(PROMPTS),
                seeds=np.arange(PROMPTS),
                tokens=np.full(PROMPTS, 3),
                ended=np.full(PROMPTS, True),
                kl=np.zeros(PROMPTS),
                scores={name: mean + DEVIATIONS[name] * swing for name, mean in zip(names, means, strict=True)},
            ),
        )
    header = {
        "format": FORMAT,
        "title": "invented",
        "base": {"path": "sft"},
        "policies": {name: {"path": name} for name in policies},
        "baselines": {"morl": {"path": "models/morl"}},
        "rewards": {name: {"unit": "", "role": "audit" if name in audits else "objective"} for name in names},
        "generation": {"dtype": "float32"},
        "options": {"engine": "vllm", "layers": None},
        "identity": {"engine": {"as": "whole models"}},
        "sweep": {"resamples": 200},
        "points": [{**spec.as_dict(), "key": key} for spec, key in zip(points, keys, strict=True)],
    }
    write_json(folder / "run.json", header)
    return folder


def curve(method, means, alpha=1.0, beta=0.0, **more):
    return {PointSpec(method, MergeSpec((lam, 1 - lam), alpha, beta, **more)): values for lam, values in means.items()}


@pytest.fixture
def run(tmp_path, monkeypatch) -> str:
    monkeypatch.chdir(tmp_path)
    invented(tmp_path / "run", curve("soup", SOUP) | curve("lines", LINES, beta=1.0))
    return "run"


def asked(cli, *words):
    """Return the JSON answer of `choose`, which prints nothing else."""
    answer = cli("choose", *words, "--json")
    assert answer.code == 0 and answer.err == "", answer.err
    return json.loads(answer.out)


def refused(cli, *words):
    answer = cli("choose", *words)
    assert answer.code == 1 and answer.out == "" and "Traceback" not in answer.err
    return answer.err


def place(found):
    return found["method"], found["weights"][0]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        # The other of two rewards is maximized.
        (["--at-least", "a=2"], ("soup", 0.5)),
        (["--at-least", "b=1"], ("lines", 0.5)),
        (["--at-least", "a=2.1"], ("lines", 0.5)),
        # A mean on its minimum meets it.
        (["--at-least", "a=4"], ("soup", 1.0)),
        (["--maximize", "a"], ("soup", 1.0)),
        (["--maximize", "b"], ("soup", 0.0)),
        (["--at-least", "a=1", "--at-least", "b=10", "--maximize", "a"], ("lines", 0.5)),
        (["--at-least", "a=1", "--at-least", "b=10", "--maximize", "b"], ("soup", 0.5)),
        # Standardized: (2 + 25/10)/2 = 2.25 for soup's middle, (3 + 18/10)/2 = 2.4 for that of lines. Unstandardized,
        # soup's first would win by 15.
        (["--weights", "a=0.5,b=0.5"], ("lines", 0.5)),
        (["--weights", "a=1,b=1"], ("lines", 0.5)),
        (["--weights", "a=0.3,b=0.7"], ("soup", 0.5)),
        (["--weights", "b=3"], ("soup", 0.0)),
        (["--weights", "a=0.5,b=0.5", "--at-least", "b=20"], ("soup", 0.5)),
        (["--weights", "a=0.5", "--weights", "b=0.5", "--at-least", "b=20"], ("soup", 0.5)),
        # SFT's means are 0: the last of lines has less of b, soup's last just as much.
        (["--maximize", "a", "--at-least-sft", "--method", "lines"], ("lines", 0.5)),
        (["--maximize", "a", "--at-least-sft"], ("soup", 1.0)),
        (["--maximize", "a", "--at-least-sft", "--at-least", "b=-5", "--method", "lines"], ("lines", 1.0)),
        # From 0 to 1 on the front's ranges, 0 … 4 and 0 … 30: 0.75 + 0.6 against 0.5 + 0.83 of soup's middle.
        (["--knee"], ("lines", 0.5)),
        (["--knee", "--method", "soup"], ("soup", 0.5)),
        (["--maximize", "a", "--method", "lines"], ("lines", 1.0)),
        (["--maximize", "a", "--method", "lines", "--method", "soup"], ("soup", 1.0)),
    ],
)
def test_choices_by_hand(cli, run, words, expected):
    found = asked(cli, run, *words)
    assert place(found) == expected and found["interpolated"] is False


def test_names_of_rewards_may_have_the_signs_of_an_option(cli, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "DEVIATIONS", {"a, but=short": 1.0, "b": 10.0})
    run = invented(tmp_path / "run", curve("soup", SOUP) | curve("lines", LINES, beta=1.0))
    assert place(asked(cli, run, "--at-least", "a, but=short=2.1")) == ("lines", 0.5)
    assert place(asked(cli, run, "--weights", "a, but=short=0.3,b=0.7")) == ("soup", 0.5)


def test_the_run_remembers_choices_by_name(cli, run, monkeypatch):
    asked(cli, run, "--maximize", "a")
    asked(cli, run, "--knee", "--name", "knee")
    choose(run, maximize="b", name=None)
    found = {name: (point.method, point.weights[0]) for name, point in recorded_choices(Path(run)).items()}
    assert found == {"chosen": ("soup", 1.0), "knee": ("lines", 0.5)}
    for name in ("default", "a/b", ""):
        assert "not a name for a choice" in refused(cli, run, "--knee", "--name", name)
    Path(run, CHOICES_FILE).write_text('{"chosen": {"point": {"method": "lines"}}}')
    with pytest.raises(UserError, match="its choices cannot be read"):
        recorded_choices(Path(run))

    def refuse(*_):
        raise PermissionError("read-only")

    monkeypatch.setattr("rewarded_lines.evaluator.recorded_choices.write_json", refuse)
    assert choose(run, knee=True).name == "" and "does not remember" in cli("choose", run, "--knee").out


def test_the_python_verb_gives_the_same(cli, run):
    chosen = choose(run, at_least={"a": 1, "b": 10}, maximize="a", methods=["lines"])
    assert chosen.as_dict() == asked(
        cli, run, "--at-least", "a=1", "--at-least", "b=10", "--maximize", "a", "--method", "lines"
    )
    assert chosen.point == PointSpec("lines", MergeSpec((0.5, 0.5), 1.0, 1.0))
    assert chosen.rule == "most a with a ≥ 1, b ≥ 10"


def test_scores_have_intervals_and_minima_a_share(run):
    chosen = choose(run, at_least={"a": 2}, maximize="b")
    assert {name: score.value for name, score in chosen.scores.items()} == {"a": 2.0, "b": 25.0}
    assert all(score.low < score.value < score.high for score in chosen.scores.values())
    # The mean lies on the minimum: by a fair draw of prompts above it as often as below, or on it.
    assert list(chosen.meets) == ["a"] and 0.5 < chosen.meets["a"] < 0.8
    wide, narrow = (choose(run, maximize="a", level=level).scores["a"] for level in (0.95, 0.5))
    assert wide.low < narrow.low < narrow.high < wide.high


@pytest.mark.parametrize(
    ("bound", "expected"),
    [
        # b falls from 25 to 0 between soup's λ 0.5 and 1, from 28 to 18 between 0 and 0.5 of lines: 20 is crossed at
        # 0.6 with a = 2.4 and at 0.4 with a = 2.5; 26 at 0.4 with a = 1.6 and at 0.1 with a = 1.
        (20, ("lines", 0.4, 2.5)),
        (26, ("soup", 0.4, 1.6)),
        (10, ("soup", 0.8, 3.2)),
        # Nothing between is better than the evaluated point.
        (18, ("lines", 0.5, 3.0)),
        (30, ("soup", 0.0, 0.0)),
    ],
)
def test_between_the_points(cli, run, bound, expected):
    found = asked(cli, run, "--at-least", f"b={bound}", "--interpolate")
    method, lam, a = expected
    assert found["method"] == method and found["weights"] == pytest.approx([lam, 1 - lam])
    assert found["scores"]["a"]["value"] == pytest.approx(a)
    assert found["scores"]["b"]["value"] == pytest.approx(bound)
    assert found["interpolated"] is (lam not in LINES)
    words = shlex.split(found["command"])
    assert parse_weights(words[words.index("--lam") + 1], ["first", "second"]) == tuple(found["weights"])
    assert words[words.index("--beta") + 1] == "0" if method == "soup" else "--beta" not in words


def test_between_is_never_worse_than_the_best_evaluated_point(run):
    rng = np.random.default_rng(0)
    for _ in range(25):
        bounds, weights = {"b": float(rng.uniform(-5, 28))}, {"a": rng.uniform(), "b": rng.uniform()}
        plain, between = (choose(run, at_least=bounds, weights=weights, interpolate=look) for look in (False, True))
        worth = [
            sum(weights[name] * one.scores[name].value / DEVIATIONS[name] for name in weights)
            for one in (plain, between)
        ]
        assert worth[1] >= worth[0] - 1e-9 and between.scores["b"].value >= bounds["b"] - 1e-9
        assert between.interpolated is (between.point.lam not in LINES)
        assert 0 <= between.point.lam <= 1


def test_only_between_points_of_one_schedule(tmp_path):
    matched = {PointSpec("uniform", MergeSpec((lam, 1 - lam), 1.5 + lam, 0.0)): means for lam, means in LINES.items()}
    folder = invented(tmp_path / "run", curve("soup", SOUP) | matched)
    chosen = choose(folder, at_least={"b": 20}, interpolate=True)
    assert (chosen.point.method, chosen.point.lam) == ("soup", pytest.approx(0.6))


def test_a_point_that_misses_by_rounding_is_evaluated_all_the_same(run):
    chosen = choose(run, at_least={"a": 4 + 1e-12}, interpolate=True)
    assert (chosen.point.lam, chosen.interpolated) == (1.0, False)


def test_between_the_points_of_two_policies_only(tmp_path, monkeypatch, cli):
    monkeypatch.chdir(tmp_path)
    corners = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
    three = {PointSpec("soup", MergeSpec(weights, 1.0, 0.0)): (1.0, 2.0) for weights in corners}
    invented(tmp_path / "run", three, policies=("first", "second", "third"))
    assert "λ lies between two policies" in refused(cli, "run", "--maximize", "a", "--interpolate")
    assert asked(cli, "run", "--maximize", "a")["method"] == "soup"


def test_nothing_qualifies(cli, run):
    said = refused(cli, run, "--at-least", "a=3", "--at-least", "b=20", "--maximize", "a")
    # 2/10 of a deviation short: nearer than one whole deviation in a.
    assert "the nearest is lines λ=0.5,0.5, with a = 3, b = 18" in said
    assert "expected: a ≥ 3, b ≥ 20" in said and "--interpolate" in said
    said = refused(cli, run, "--at-least", "a=3", "--at-least", "b=27", "--maximize", "a", "--interpolate")
    assert "the nearest is lines" in said and "look between" not in said
    assert "the nearest is soup λ=1,0, with a = 4" in refused(cli, run, "--at-least", "a=99")


def test_what_no_point_meets_one_between_may(cli, run):
    found = asked(cli, run, "--at-least", "a=2.5", "--at-least", "b=20", "--maximize", "a", "--interpolate")
    assert place(found) == ("lines", pytest.approx(0.4)) and found["interpolated"]
    # The minimum is met where both numbers are, in resamples by about every second.
    assert 0.3 < found["meets"]["b"] < 0.8


def test_audits_are_shown_and_choose_nothing(tmp_path, monkeypatch, cli):
    monkeypatch.chdir(tmp_path)
    means = {lam: (*pair, 9.0 * lam) for lam, pair in SOUP.items()}
    invented(tmp_path / "run", curve("soup", means), audits=["c"])
    for words in (["--maximize", "c"], ["--at-least", "c=1"], ["--weights", "a=1,c=1"]):
        said = refused(cli, "run", *words)
        assert "`c` is an audit, which `choose` ignores" in said and "one of a, b" in said
    found = asked(cli, "run", "--at-least", "a=2")
    assert place(found) == ("soup", 0.5) and found["scores"]["c"]["value"] == pytest.approx(4.5)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "say what to look for"),
        (["--maximize", "a", "--knee"], "more than one"),
        (["--maximize", "a", "--weights", "a=1"], "more than one"),
        (["--at-least", "a=1", "--at-least", "b=1"], "say what to look for"),
        (["--maximize", "aa"], "did you mean `a`?"),
        (["--at-least", "d=1"], "one of a, b"),
        (["--weights", "a=1,bb=1"], "no reward `bb`"),
        (["--knee", "--method", "lins"], "did you mean `lines`?"),
        (["--knee", "--method", "sft"], "SFT is no candidate"),
        (["--at-least", "a"], "not NAME=NUMBER"),
        (["--at-least", "a="], "not NAME=NUMBER"),
        (["--at-least", "=1"], "not NAME=NUMBER"),
        (["--at-least", "a=one"], "not NAME=NUMBER"),
        (["--at-least", "a=nan"], "not NAME=NUMBER"),
        (["--at-least", "a=1", "--at-least", "a=2"], "each reward once"),
        (["--weights", "a=1,"], "not NAME=NUMBER"),
        (["--weights", "a=inf"], "not NAME=NUMBER"),
        (["--weights", "a=-1,b=1"], "not weights"),
        (["--weights", "a=0"], "one of them above 0"),
        (["--knee", "--interpolate"], "a knee is an evaluated point"),
    ],
)
def test_questions_that_cannot_be(cli, run, words, said):
    assert said in refused(cli, run, *words)


def test_names_of_rewards_may_have_commas_and_equals_signs(cli, tmp_path, monkeypatch):
    """As folders of Hydra's sweeps have, after which a reward model is named."""
    name = "lr=1e-5,seed=0"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys.modules[__name__], "DEVIATIONS", {name: 1.0, "b": 10.0})
    invented(tmp_path / "run", curve("soup", SOUP) | curve("lines", LINES, beta=1.0))
    for words in (["--weights", f"{name}=0.5,b=0.5"], ["--weights", f"b=0.5,{name}=0.5"], ["--at-least", f"{name}=3"]):
        assert place(asked(cli, "run", *words)) == ("lines", 0.5)
    assert "no reward `seed=0`" in refused(cli, "run", "--weights", "seed=0=1")


def test_all_unknown_names_are_told_at_once(cli, run):
    said = refused(cli, run, "--at-least", "x=1", "--maximize", "y", "--method", "z")
    assert all(f"no {what}" in said for what in ("reward `x`", "reward `y`", "method `z`"))


def test_python_numbers_are_checked_too(run):
    for wish in ({"at_least": {"a": float("nan")}}, {"weights": {"a": float("inf")}}, {"weights": {"a": float("nan")}}):
        with pytest.raises(UserError, match="not a minimum|not weights"):
            choose(run, **wish)
    with pytest.raises(UserError, match="no reward ``"):
        choose(run, maximize="")


def test_a_folder_that_is_no_run(cli, tiny):
    assert "not a run folder" in refused(cli, "sft", "--knee")


def test_models_that_are_there_already(tmp_path, monkeypatch, cli):
    monkeypatch.chdir(tmp_path)
    single = {PointSpec("policies", MergeSpec((1.0, 0.0), 1.0, 0.0), "first"): (9.0, 0.0)}
    points = curve("soup", SOUP) | single | {PointSpec("baselines", checkpoint="morl"): (0.0, 99.0)}
    invented(tmp_path / "run", points)
    assert cli("choose", "run", "--maximize", "a").out.splitlines()[-1] == "# nothing to merge: first"
    assert cli("choose", "run", "--maximize", "b").out.splitlines()[-1] == "# nothing to merge: models/morl"
    assert asked(cli, "run", "--maximize", "b")["checkpoint"] == "morl"


def test_the_answer_fits_80_columns(run):
    for words in (["--weights", "a=0.25,b=0.75", "--at-least", "b=20"], ["--at-least", "b=20", "--interpolate"]):
        answer = CliRunner().invoke(app, ["choose", run, *words], env={"COLUMNS": "80"})
        *lines, command = answer.output.splitlines()
        assert answer.exit_code == 0 and max(map(len, lines)) <= 80
        # One line, for copying.
        assert shlex.split(command)[:2] == ["rewarded-lines", "merge"]
    assert "between evaluated points: a guess" in answer.output
    assert "fresh prompts" in answer.output


METHODS = """\
  resamples: 100
  methods:
    lines:
    reversed:
    ties:
    rough: {merge: dare, alpha: 0.7, beta: -0.2, options: {density: 0.5, seed: 3}}
    mean: {merge: uniform}
    policies:
baselines:
  morl: second
"""


@pytest.fixture(scope="module")
def swept(tiny_source, tmp_path_factory) -> Path:
    """A sweep of many methods over a base and policies in bfloat16, computed in float32."""
    folder = tmp_path_factory.mktemp("swept") / "tiny"
    shutil.copytree(tiny_source, folder)
    for name in ("sft", "first", "second"):
        AutoModelForCausalLM.from_pretrained(folder / name).to(torch.bfloat16).save_pretrained(folder / name)
    project = folder / "rewarded-lines.yaml"
    project.write_text(project.read_text() + METHODS)
    sweep(project, engine="hf", points=3)
    return folder


def answers_of(model, folder):
    project = load_project(folder / "rewarded-lines.yaml")
    prompts = load_run(folder / "sweep").sft.prompts
    generator = load_generator("hf", str(model), project.config.generation, prompts)
    (responses,) = generator.generate(prompts, project.config.generation)
    return [response.text for response in responses]


@pytest.mark.parametrize("method", ["lines", "reversed", "ties", "rough", "mean"])
def test_the_command_makes_the_policy_that_was_evaluated(cli, swept, tmp_path, monkeypatch, method):
    monkeypatch.chdir(tmp_path)
    found = asked(cli, swept / "sweep", "--knee", "--method", method)
    command = cli("choose", swept / "sweep", "--knee", "--method", method).out.splitlines()[-1]
    assert command == found["command"]
    made = cli(*shlex.split(command)[1:])
    assert made.code == 0, made.err
    run = load_run(swept / "sweep")
    (point,) = [p for p in run.methods()[method] if list(p.spec.weights) == found["weights"]]
    assert answers_of("chosen", swept) == point.responses


def test_of_single_policies_and_baselines_it_says_where_they_lie(cli, swept):
    for method, folders in (("policies", ["first", "second"]), ("baselines", ["second"])):
        command = asked(cli, swept / "sweep", "--knee", "--method", method)["command"]
        assert command in [f"# nothing to merge: {swept / name}" for name in folders]


def test_the_command_folds_adapters_as_the_sweep_did_and_runs_anywhere(tiny, tmp_path, monkeypatch, cli):
    pytest.importorskip("peft")
    from tiny_adapters import save_adapter

    for seed, name in enumerate(("first", "second"), start=1):
        shutil.rmtree(tiny / name)
        save_adapter(tiny / "sft", tiny / name, seed)
    project = tiny / "rewarded-lines.yaml"
    project.write_text(project.read_text() + "  resamples: 100\n  methods: [ties]\n")
    run = sweep(engine="hf", points=2)
    monkeypatch.chdir(tmp_path)
    command = asked(cli, tiny / "sweep", "--knee")["command"]
    made = cli(*shlex.split(command)[1:])
    assert made.code == 0, made.err
    assert answers_of("chosen", tiny) in [point.responses for point in run.methods()["ties"]]
    assert os.path.isfile("chosen/config.json")

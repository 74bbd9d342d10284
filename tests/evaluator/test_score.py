"""`score` equals the sweep's scores of the same weights and leaves no files unless `out` is given."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import pytest

from rewarded_lines import merge, score, sweep
from rewarded_lines.errors import UserError
from rewarded_lines.evaluator.records import load_run
from rewarded_lines.projects import load_project


@pytest.fixture
def merged(tiny) -> str:
    merge("sft", ["first", "second"], 0.5, beta=0.0, out="merged/lam=0.50")
    return "merged/lam=0.50"


def files(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if "__pycache__" not in path.parts}


def test_a_model_scores_as_the_sweeps_own_point(tiny, merged):
    run = sweep(engine="hf", points=3)
    (point,) = [one for one in run.methods()["soup"] if one.spec.lam == 0.5]
    found = score(merged, engine="hf")
    sft, model = found.points
    assert (model.spec.method, model.spec.checkpoint) == ("policies", "lam=0.50")
    for one, other in ((model, point), (sft, run.sft)):
        assert one.responses == other.responses and one.prompts == other.prompts
        assert (one.seeds == other.seeds).all() and (one.kl == other.kl).all()
        assert {name: scores.tolist() for name, scores in one.scores.items()} == {
            name: scores.tolist() for name, scores in other.scores.items()
        }


def test_nothing_is_kept_without_out(tiny, merged, cli, monkeypatch):
    (tiny / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tiny / "temporary"))
    before = files(tiny)
    answer = cli("score", merged, "--engine", "hf", "--json")
    assert answer.code == 0, answer.err
    assert files(tiny) == before
    told = json.loads(answer.out)
    assert list(told) == ["model", "sft", "gain"] and told["model"]["checkpoint"] == "lam=0.50"
    # As in `summary.json`: the method's name and its schedule, side by side.
    assert [told["model"][key] for key in ("merge", "alpha", "beta")] == ["soup", 1.0, 0.0]
    for name in ("words", "letters"):
        change = told["model"]["rewards"][name]["value"] - told["sft"]["rewards"][name]["value"]
        assert told["gain"][name]["value"] == pytest.approx(change)


def test_with_out_it_is_a_run_that_report_and_choose_read(tiny, merged, cli):
    pytest.importorskip("matplotlib")
    # A project need not have policies of its own to score a model.
    project = tiny / "rewarded-lines.yaml"
    project.write_text(project.read_text().replace("policies:\n  first: first\n  second: second\n", ""))
    answer = cli("score", merged, "--engine", "hf", "--out", "scored")
    assert answer.code == 0, answer.err
    for expected in ("lam=0.50", "Points", "Beside the front", "Policies against SFT", "rewarded-lines report scored"):
        assert expected in answer.out
    assert len(load_run("scored").points) == 2
    reported = cli("report", "scored")
    assert reported.code == 0, reported.err
    assert "lam=0.50" in reported.out and "lam=0.50" in (tiny / "scored/report/front.svg").read_text()
    chosen = cli("choose", "scored", "--knee")
    assert chosen.out.splitlines()[-1] == f"# nothing to merge: {tiny / merged}"
    again = score(merged, engine="hf", out="scored")
    assert again.header["evaluated_last"] == 0
    # Without a folder the points stay in memory.
    alone = score(merged, engine="hf")
    assert [one.responses for one in alone.points] == [one.responses for one in load_run("scored").points]
    # Another model does not go into the same folder, unless that is begun anew.
    refused = cli("score", "first", "--engine", "hf", "--out", "scored")
    assert refused.code == 1 and "another configuration" in refused.err and "--overwrite" in refused.err
    assert score("first", engine="hf", out="scored", overwrite=True).points[1].spec.checkpoint == "first"


def test_methods_tuning_and_baselines_of_the_project_have_no_part(tiny):
    project = tiny / "rewarded-lines.yaml"
    tune = "  methods: [lines]\n  tune: {trials: 3, prompts: {file: nowhere.jsonl}}\nbaselines: {morl: nowhere}\n"
    project.write_text(project.read_text() + tune)
    run = score("first", load_project(project), engine="hf")
    assert [str(point.spec) for point in run.points] == ["sft", "policies first"]


def test_the_design_of_the_projects_sweep_has_no_part(tiny):
    with open("rewarded-lines.yaml", "a") as file:
        file.write("  design: spread\n")
    assert score("first", engine="hf").points


def test_the_base_itself_gains_nothing(tiny):
    run = score("sft", engine="hf")
    sft, model = run.points
    assert model.responses == sft.responses and model.kl == pytest.approx(0, abs=1e-4)


def test_an_adapter_is_scored_over_the_base(tiny):
    pytest.importorskip("peft")
    from tiny_adapters import save_adapter

    save_adapter(tiny / "sft", tiny / "lora", 3)
    merge("sft", ["lora"], 1.0, beta=0.0, as_="full", out="folded")
    adapter, whole = (score(model, engine="hf").points[1] for model in ("lora", "folded"))
    assert adapter.spec.checkpoint == "lora" and adapter.responses == whole.responses


@pytest.mark.parametrize("model", ["nowhere", "rewards.py", "merged/nowhere", "empty", "./empty"])
def test_what_is_no_model_is_one_message(tiny, cli, model):
    (tiny / "empty").mkdir()
    answer = cli("score", model, "--engine", "hf")
    assert answer.code == 1 and answer.out == "" and "Traceback" not in answer.err
    assert answer.err.count("remedy:") <= 1 and model.split("/")[-1] in answer.err


def test_python_paths(tiny):
    with pytest.raises(UserError, match="no such model"):
        score(tiny / "nowhere", engine="hf")
    shutil.copytree("first", "models/policy")
    assert score(Path("models/policy"), engine="hf").points[1].spec.checkpoint == "policy"

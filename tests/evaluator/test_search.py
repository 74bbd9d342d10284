"""The search for λ with the reference engine: what it adds, where it stops, what it keeps."""

from __future__ import annotations

import json

import pytest
from progress_told import Told

from rewarded_lines import search, sweep
from rewarded_lines.errors import UserError
from rewarded_lines.evaluator.evaluate import LocalEvaluator
from rewarded_lines.evaluator.points import PointSpec
from rewarded_lines.evaluator.records import load_run
from rewarded_lines.evaluator.run_folder import RunFolder
from rewarded_lines.pareto.hypervolume import hypervolume

# One method is enough here.
ONE = "  resamples: 100\n  methods: [lines]\n"
# Scores that differ from response to response, where counts of words would often be equal.
REWARDS = """\
import hashlib


def words(prompts, responses):
    return [int(hashlib.sha256(r.encode()).hexdigest(), 16) % 97 / 97 for r in responses]


def letters(prompts, responses):
    return [int(hashlib.sha256(r.encode()).hexdigest(), 16) % 89 / 89 for r in responses]
"""


def project(tiny, text=ONE, points=2):
    path = tiny / "rewarded-lines.yaml"
    head = path.read_text().split("sweep:")[0]
    path.write_text(f"{head}sweep:\n  points: {points}\n{text}")
    (tiny / "rewards.py").write_text(REWARDS)
    return path


def lams(run, method="lines"):
    return [point.spec.lam for point in run.methods()[method]]


def test_points_are_added_up_to_the_budget_and_stay_there(tiny, cli):
    project(tiny)
    sweep(engine="hf")
    answer = cli("search", "sweep", "--points", 6, "--gain", 0, "--json")
    assert answer.code == 0 and answer.err == ""
    told = json.loads(answer.out)
    (found,) = told["methods"]
    assert told["folder"] == "sweep" and (found["method"], found["points"], found["added"]) == ("lines", 6, 4)
    # The budget ended it, not the front: the next point is still worth something, and that is said.
    assert found["reason"] == "points" and found["potential"] > 0
    run = load_run("sweep")
    assert len(set(lams(run))) == 6 and {0.0, 0.5, 1.0} < set(lams(run))
    assert all(round(lam * 10_000) == pytest.approx(lam * 10_000) for lam in lams(run))
    means = [[float(point.scores[name].mean()) for name in run.objectives] for point in [*run.methods()["lines"]]]
    sft = [float(run.sft.scores[name].mean()) for name in run.objectives]
    assert found["hypervolume"] == pytest.approx(hypervolume(means, sft))
    added = [PointSpec.from_dict(entry) for entry in run.header["added"]]
    assert len(added) == 4 and {spec.lam for spec in added} == set(lams(run)) - {0.0, 1.0}
    assert run.header["complete"] is True and run.header["evaluated_last"] == 4
    # Neither a second search nor a sweep makes anything again, or loses anything.
    assert search("sweep", points=6, gain=0)[0].header["evaluated_last"] == 0
    again = sweep(engine="hf")
    assert again.header["evaluated_last"] == 0 and lams(again) == lams(run)
    assert again.header["added"] == run.header["added"]
    more = sweep(engine="hf", points=3)
    assert lams(more) == lams(run) and more.header["evaluated_last"] == 0
    text = cli("search", "sweep", "--points", 6, "--gain", 0).out
    assert "lines: 6 points (0 added)" in text and "the budget is spent" in text and "could add 0 at" not in text


def test_it_ends_where_nothing_can_be_gained(tiny):
    project(tiny)
    sweep(engine="hf", points=3)
    run, (found,) = search("sweep", methods=["lines", "lines"], points=50, gain=1e9)
    assert (found.points, found.added, found.reason) == (3, 0, "gain") and run.header["evaluated_last"] == 0
    run, (found,) = search("sweep", points=3)
    assert (found.added, found.reason) == (0, "points")
    _, (found,) = search("sweep", points=2)
    assert (found.points, found.added, found.reason) == (3, 0, "points")


def test_killed_between_points_it_ends_as_if_nothing_had_been(tiny, monkeypatch):
    project(tiny)
    sweep(engine="hf", out="whole")
    whole, _ = search("whole", points=5, gain=0)
    sweep(engine="hf", out="killed")
    evaluate = LocalEvaluator.evaluate
    for _ in range(2):
        made = []

        def dying(evaluator, setup, keys, missing, made=made):
            if made:
                raise KeyboardInterrupt
            for item in evaluate(evaluator, setup, keys, missing):
                made.append(item)
                yield item

        monkeypatch.setattr(LocalEvaluator, "evaluate", dying)
        with pytest.raises(KeyboardInterrupt):
            search("killed", points=5, gain=0)
    monkeypatch.setattr(LocalEvaluator, "evaluate", evaluate)
    killed, (found,) = search("killed", points=5, gain=0)
    assert found.points == 5
    assert killed.header["points"] == whole.header["points"] and killed.header["added"] == whole.header["added"]
    for one, other in zip(killed.points, whole.points, strict=True):
        assert one.responses == other.responses


def test_killed_after_the_record_and_before_the_list(tiny, monkeypatch):
    project(tiny)
    sweep(engine="hf")
    add = RunFolder.add

    def dying(run, specs):
        if specs:
            raise KeyboardInterrupt

    monkeypatch.setattr(RunFolder, "add", dying)
    with pytest.raises(KeyboardInterrupt):
        search("sweep", points=4, gain=0)
    monkeypatch.setattr(RunFolder, "add", add)
    before = {path.name for path in (tiny / "sweep/points").iterdir()}
    run, (found,) = search("sweep", points=3, gain=0)
    # The λ proposed again is the one that is there.
    assert found.added == 1 and run.header["evaluated_last"] == 0
    assert {path.name for path in (tiny / "sweep/points").iterdir()} == before


def test_a_new_run_begins_with_three(tiny, cli):
    path = project(tiny)
    answer = cli("search", "runs/new", "--config", path, "--engine", "hf", "--points", 4, "--gain", 0, "--json")
    assert answer.code == 0, answer.err
    (found,) = json.loads(answer.out)["methods"]
    assert (found["points"], found["added"]) == (4, 1)
    assert {0.0, 0.5, 1.0} < set(lams(load_run("runs/new")))


def test_a_method_that_the_run_does_not_have_yet_begins_with_three_that_stay(tiny):
    project(tiny)
    sweep(engine="hf")
    project(tiny, "  resamples: 100\n  methods: [lines, soup]\n")
    run, (found,) = search("sweep", methods=["soup"], points=4, gain=0)
    assert (found.points, found.added) == (4, 4) and len(lams(run, "soup")) == 4
    assert {0.0, 0.5, 1.0} < set(lams(run, "soup")) and lams(run) == [0.0, 1.0]
    again, (found,) = search("sweep", methods=["soup"], points=4, gain=0)
    assert found.added == 0 and again.header["points"] == run.header["points"]


def test_points_of_a_method_that_was_changed_are_left_out(tiny):
    mine = "  resamples: 100\n  methods:\n    mine: {alpha: %s, beta: 0}\n"
    project(tiny, mine % 1)
    sweep(engine="hf")
    search("sweep", points=3, gain=0)
    project(tiny, mine % 0.5)
    run, (found,) = search("sweep", points=4, gain=0)
    assert {point.spec.merge.alpha for point in run.methods()["mine"]} == {0.5} and found.points == 4
    assert {entry["alpha"] for entry in run.header["added"]} == {0.5}


def test_three_policies_and_every_merged_method(tiny):
    path = project(tiny, "  resamples: 100\n  methods: [uniform, ties, policies]\n")
    path.write_text(path.read_text().replace("policies:\n", "policies:\n  again: first\n", 1))
    sweep(engine="hf")
    run, found = search("sweep", points=4, gain=0)
    assert [(one.method, one.points) for one in found] == [("uniform", 4), ("ties", 4)]
    for method in ("uniform", "ties"):
        weights = [point.spec.weights for point in run.methods()[method]]
        assert len(set(weights)) == 4 and all(sum(one) == pytest.approx(1) for one in weights)
    (new,) = [p.spec for p in run.methods()["uniform"] if 1.0 not in p.spec.weights]
    # A matched method's α is worked out where the new λ lies.
    assert new.merge.alpha > 1 and new.merge.beta == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--method", "linse"], "did you mean `lines`?"),
        (["--method", "policies"], "no merged method `policies`"),
        (["--method", "sft"], "no merged method `sft`"),
    ],
)
def test_methods_that_have_no_front(tiny, cli, words, said):
    path = project(tiny, "  methods: [lines, policies]\n")
    answer = cli("search", "new", "--config", path, "--engine", "hf", *words)
    assert answer.code == 1 and said in answer.err and answer.out == ""
    # Refused before anything is generated.
    assert not (tiny / "new").exists()


def test_runs_that_cannot_be_searched(tiny, cli):
    answer = cli("search", "nowhere")
    assert answer.code == 1 and "no run there" in answer.err and "--config" in answer.err
    path = project(tiny, "  methods: [policies]\n")
    with pytest.raises(UserError, match="(?s)nothing to search.*merges along λ"):
        search("new", config=path, engine="hf")
    path.write_text(path.read_text().replace("  second: second\n", "").replace("[policies]", "[lines]"))
    with pytest.raises(UserError, match="(?s)nothing to search.*two policies"):
        search("new", config=path, engine="hf")
    assert not (tiny / "new").exists()


def test_another_configuration_is_refused(tiny):
    path = project(tiny)
    sweep(engine="hf")
    path.write_text(path.read_text().replace("max_tokens: 12", "max_tokens: 9"))
    with pytest.raises(UserError, match="belongs to another configuration"):
        search("sweep")


def test_a_sweep_drops_what_a_search_added_to_a_method_that_has_changed_since(tiny):
    project = tiny / "rewarded-lines.yaml"
    text = project.read_text().split("sweep:")[0]
    project.write_text(text + "sweep:\n  points: 2\n  methods: {mine: {alpha: 1.0, beta: 0.0}}\n")
    sweep(engine="hf")
    search("sweep", points=3, gain=0)
    assert len(sweep(engine="hf").methods()["mine"]) == 3
    project.write_text(project.read_text().replace("alpha: 1.0", "alpha: 0.5"))
    points = sweep(engine="hf").methods()["mine"]
    assert {point.spec.merge.alpha for point in points} == {0.5} and len(points) == 2


def test_a_baseline_that_has_left_the_project_has_left_the_run(tiny):
    path = project(tiny)
    text = path.read_text()
    path.write_text(text + "baselines: {other: second}\n")
    assert "baselines" in sweep(engine="hf").methods()
    path.write_text(text)
    run, _ = search("sweep", points=3, gain=0)
    assert list(run.methods()) == ["lines"] and run.header["complete"] is True


def test_a_sweep_that_was_killed_while_tuning_is_not_complete(tiny, monkeypatch):
    pytest.importorskip("optuna")
    (tiny / "validation.jsonl").write_text('{"prompt": "a film 1"}\n')
    project(tiny, ONE + "  tune: {trials: 1, points: 2, prompts: {file: validation.jsonl}}\n")

    def dying(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(LocalEvaluator, "evaluate", dying)
        sweep(engine="hf")
    run, _ = search("sweep", points=3, gain=0)
    assert run.header["complete"] is False and run.header["tuned"] is None
    run = sweep(engine="hf")
    assert run.header["complete"] is True and run.header["tuned"] and "tuned" in run.methods()


def test_progress_counts_each_point_once(tiny):
    project(tiny)
    sweep(engine="hf")
    told = Told()
    search("sweep", points=5, gain=0, progress=told)
    # SFT's, and five of the method's.
    assert sum(count for count, _ in told.finished) == 6 and set(told.totals) == {6}

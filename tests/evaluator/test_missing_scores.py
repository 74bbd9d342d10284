"""Missing scores: means, intervals and paired differences by plain loops; records, counts, refusals, commands."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
from invented_runs import synthetic_run

from rewarded_lines import choose, search, sweep
from rewarded_lines.errors import UserError
from rewarded_lines.evaluator import evaluate, records
from rewarded_lines.evaluator.missing_scores import Missing, doubts
from rewarded_lines.evaluator.points import PointSpec
from rewarded_lines.evaluator.records import Point, Run, load_run, read_point, whole_point, write_point
from rewarded_lines.merger.spec import MergeSpec
from rewarded_lines.pareto.bootstrap import resample_means, resample_runs
from rewarded_lines.reports.page.page import page
from rewarded_lines.reports.summary import summarise
from rewarded_lines.reports.tables import markdown, points_csv
from rewarded_lines.rewards.scorer import Scorer

NAN = math.nan
PROMPTS, SAMPLES, RESAMPLES = 12, 2, 60
SPECS = [
    PointSpec("sft"),
    PointSpec("soup", MergeSpec((0.0, 1.0), 1.0, 0.0)),
    PointSpec("soup", MergeSpec((1.0, 0.0), 1.0, 0.0)),
]


def invented(spec: PointSpec, seed: int, share: float = 0.3) -> Point:
    """Return a point with two responses to each prompt, of which some have no score of `a`."""
    rng, rows = np.random.default_rng(seed), PROMPTS * SAMPLES
    scores = {name: rng.normal(size=rows) for name in ("a", "b")}
    scores["a"][rng.random(rows) < share] = NAN
    # One prompt without any.
    scores["a"][2 * seed : 2 * seed + 2] = NAN
    index = np.repeat(np.arange(PROMPTS), SAMPLES)
    texts = {"prompts": [f"prompt {at}" for at in index], "responses": ["one two"] * rows}
    whole = {"seeds": index, "tokens": index + 1, "ended": index >= 0, "kl": rng.normal(size=rows)}
    return Point(spec=spec, prompt_index=index, scores=scores, failed={"a": 2}, **texts, **whole)


@pytest.fixture
def run(tmp_path) -> Run:
    header = {
        "rewards": {"a": {"unit": "x"}, "b": {}},
        "policies": {"first": "p", "second": "q"},
        "points": list("xyz"),
        "sweep": {"resamples": RESAMPLES},
    }
    return Run(tmp_path, header, [invented(spec, seed) for seed, spec in enumerate(SPECS)])


def test_what_makes_scores_doubtful_is_told():
    values, ended = {"a": np.array([1.0, NAN, 2.0]), "b": np.array([3.0, NAN, 3.0])}, np.array([False, True, False])
    constant, cut = doubts("sft", values, ended, 64)
    assert constant.startswith("reward `b` gives every response of sft the score 3")
    assert cut.startswith("67% of the responses of sft are cut off after 64 tokens")
    assert doubts("sft", {"a": values["a"]}, ~ended, 64) == []


def by_prompt(scores) -> list[float | None]:
    """Each prompt's mean score of those that are there."""
    rows = np.reshape(scores, (PROMPTS, SAMPLES)).tolist()
    there = [[score for score in row if not math.isnan(score)] for row in rows]
    return [sum(row) / len(row) if row else None for row in there]


def draws() -> list[list[int]]:
    """The prompts that each resample draws, found with one-hot scores."""
    counts = resample_means(np.eye(PROMPTS)[None], RESAMPLES, seed=0)[:, 0] * PROMPTS
    return [np.repeat(np.arange(PROMPTS), row.round().astype(int)).tolist() for row in counts]


def expected(values: list[float | None]) -> list[float]:
    """The mean of what is there, and the ends of its interval, by loops."""

    def mean(places) -> float | None:
        there = [values[at] for at in places if values[at] is not None]
        return sum(there) / len(there) if there else None

    samples = [one for one in map(mean, draws()) if one is not None]
    return [mean(range(PROMPTS)), *np.quantile(samples, [0.025, 0.975])]


def told(estimate) -> list[float]:
    return [estimate.value, estimate.low, estimate.high]


def test_means_and_intervals_are_over_what_is_there(run):
    summary = summarise(run)
    for point, shown in zip(run.points, summary.points, strict=True):
        for name in ("a", "b"):
            assert told(shown.rewards[name]) == pytest.approx(expected(by_prompt(point.scores[name])))
        assert point.means(["a", "b"]) == pytest.approx([shown.rewards[name].value for name in ("a", "b")])
        assert shown.missing == {"a": Missing(24, int(np.isnan(point.scores["a"]).sum()) - 2, 2)}
    sft, *policies = run.points
    for gain, point in zip(summary.policy_gains, reversed(policies), strict=True):
        pairs = list(zip(by_prompt(point.scores["a"]), by_prompt(sft.scores["a"]), strict=True))
        change = [None if None in pair else pair[0] - pair[1] for pair in pairs]
        assert None in change and told(gain.rewards["a"]) == pytest.approx(expected(change))
    count = sum(int(np.isnan(point.scores["a"]).sum()) for point in run.points)
    assert summary.missing == run.missing == {"a": Missing(72, count - 6, 6)}
    text = json.dumps(summary.as_dict(), allow_nan=False)
    assert json.loads(text)["missing"] == {"a": {"responses": 72, "abstained": count - 6, "failed": 6}}
    first = next(csv.DictReader(io.StringIO(points_csv(summary))))
    assert first["a.missing"] == str(summary.points[0].missing["a"].count) and "b.missing" not in first


def test_a_resample_that_draws_no_score_is_left_out():
    values = np.full((1, 4, 1), NAN)
    values[0, :2, 0] = 1.0, 3.0
    again = resample_means(values, 200, seed=0)[:, 0, 0]
    empty = int(np.isnan(again).sum())
    assert 0 < empty < 40 and set(again[~np.isnan(again)]) <= {1.0, 1.5, 5 / 3, 2.0, 7 / 3, 2.5, 3.0}
    samples = resample_runs([values, np.zeros((1, 4, 1))], 200, seed=0)
    assert samples.means.shape == (201 - empty, 2, 1, 1) and samples.drawn.shape == (201 - empty, 2)
    assert np.isfinite(samples.means).all() and samples.means[0, 0, 0, 0] == 2.0


@pytest.mark.parametrize(("there", "count"), [([], 0), ([3], 1)])
def test_too_few_scores_are_refused(run, there, count):
    sft, *others = run.points
    few = np.full(24, NAN)
    few[there] = 1.0
    broken = replace(others[1], scores={"a": few, "b": sft.scores["b"]})
    with pytest.raises(UserError) as caught:
        summarise(replace(run, points=[sft, others[0], broken]))
    (problem,) = caught.value.problems
    assert (problem.what, problem.where) == ("too few prompts have a score", "soup λ=1,0, reward `a`")
    assert problem.got.startswith(f"{count} of 12 prompts; {24 - count} of 24 responses have no score")
    assert problem.remedy


def test_points_without_a_common_prompt_are_refused(run):
    sft, first, second = run.points
    halves = np.array([1.0] * 12 + [NAN] * 12)
    turned = [
        replace(sft, scores=sft.scores | {"a": halves}),
        replace(second, scores=second.scores | {"a": halves[::-1]}),
    ]
    points = [turned[0], first, turned[1]]
    with pytest.raises(UserError, match="both soup λ=1,0 and sft, reward `a`(.|\n)*0 of 12 prompts"):
        summarise(replace(run, points=points))


def test_a_missing_score_is_null_on_disk(run, tmp_path):
    path = tmp_path / "point.parquet"
    write_point(path, run.points[0])
    column = pq.read_table(path).column("score.a")
    assert column.null_count == int(np.isnan(run.points[0].scores["a"]).sum()) > 2
    again = read_point(path)
    assert again.failed == {"a": 2} and again.missing == run.points[0].missing
    for name in ("a", "b"):
        assert again.scores[name].dtype == np.float64
        assert np.array_equal(again.scores[name], run.points[0].scores[name], equal_nan=True)


def test_a_score_that_is_nan_on_disk_is_damage(run, tmp_path, monkeypatch):
    path = tmp_path / "point.parquet"
    own = records.pa.array
    with monkeypatch.context() as patched:
        patched.setattr(records, "pa", SimpleNamespace(**vars(records.pa) | {"array": lambda values, **_: own(values)}))
        write_point(path, run.points[0])
    with pytest.raises(UserError, match="not a whole point record(.|\n)*NaN"):
        read_point(path)
    assert whole_point(path) is None and not path.exists()


def test_where_nothing_is_missing_nothing_is_told(tmp_path):
    folder = synthetic_run(tmp_path / "run", points=3, prompts=16, resamples=50)
    content = summarise(load_run(folder)).as_dict()
    assert "missing" not in content and not any("missing" in point for point in content["points"])
    assert b'"failed"' not in pq.read_schema(next((folder / "points").iterdir())).metadata[b"rewarded_lines"]
    assert load_run(folder).missing == {} and ".missing" not in points_csv(summarise(load_run(folder)))


def means_of_before(scores, resamples, seed):
    """What `resample_means` was before scores could be missing."""
    points, prompts, rewards = scores.shape
    drawn = np.random.default_rng(seed).multinomial(prompts, np.full(prompts, 1 / prompts), size=resamples)
    columns = scores.transpose(1, 0, 2).reshape(prompts, points * rewards)
    return (drawn.astype(np.float64) @ columns / prompts).reshape(resamples, points, rewards)


@pytest.mark.parametrize("shape", [{"rewards": 1, "policies": 1}, {"rewards": 3, "policies": 3, "control": 1.0}])
def test_where_nothing_is_missing_every_bit_stays(tmp_path, monkeypatch, shape):
    run = load_run(synthetic_run(tmp_path / "run", points=4, prompts=33, resamples=50, **shape))
    now = json.dumps(summarise(run).as_dict())
    means = run.sft.means(run.objectives)
    assert means == [float(np.mean(run.sft.scores[name])) for name in run.objectives]
    monkeypatch.setattr("rewarded_lines.pareto.bootstrap.resample_means", means_of_before)
    monkeypatch.setattr("rewarded_lines.pareto.bootstrap.present_mean", lambda values, axis: values.mean(axis=axis))
    before = "rewarded_lines.evaluator.paired_scores.prompt_means"
    monkeypatch.setattr(before, lambda values, count: values.reshape(count, -1, values.shape[1]).mean(axis=1))
    assert json.dumps(summarise(run).as_dict()) == now


@pytest.fixture
def gaps(monkeypatch):
    """Let the reward `words` of the tiny project have no score for every third response; some of them failed."""
    calls, own = [], Scorer.score

    def score(self, prompts, *others):
        found = own(self, prompts, *others)
        found["words"] = [NAN if at % 3 == 1 else value for at, value in enumerate(found["words"])]
        self.failed = {"words": 2, "letters": 0} if fails else {}
        calls.append(len(prompts))
        return found

    fails = False
    monkeypatch.setattr(Scorer, "score", score)

    def allow():
        nonlocal fails
        fails = True
        # A function cannot fail for good: its declaration is read as if it said `missing: leave_out`.
        monkeypatch.setattr(evaluate, "_LEAVE_OUT", "refuse")

    return allow, calls


def test_a_sweep_goes_on_counts_and_tells(tiny, gaps, cli):
    pytest.importorskip("plotly")
    allow, calls = gaps
    allow()
    answer = cli("sweep", "--engine", "hf", "--points", "2", "--json")
    assert answer.code == 0, answer.err
    run = load_run(tiny / "sweep")
    # Each point by itself, so that its failures are its own.
    assert calls == [15] * 5 and all(point.missing == {"words": Missing(15, 3, 2)} for point in run.points)
    whole = {"responses": 75, "abstained": 15, "failed": 10}
    assert json.loads(answer.out)["missing"] == {"words": whole}
    line = "reward `words`: 25 of 75 responses have no score (15 abstained, 10 failed)"
    assert line in cli("sweep", "--engine", "hf", "--points", "2").err and calls == [15] * 5
    summary = summarise(run)
    assert summary.as_dict()["missing"] == {"words": whole} and line in markdown(summary)
    assert line.encode() in page([run], summary)
    chosen = choose(tiny / "sweep", maximize="letters", at_least={"words": 0.0})
    assert chosen.missing == run.missing and np.isfinite(chosen.scores["words"].low)
    assert line in cli("choose", "sweep", "--maximize", "letters").out
    found, _ = search(tiny / "sweep", methods=["soup"], points=3, gain=0.0, engine="hf")
    assert found.missing["words"].failed == 2 * len(found.points)


def test_score_tells_what_has_no_score(tiny, cli):
    text = (tiny / "rewards.py").read_text()
    none = "[None if prompt == 'dog' else len(response.split()) for prompt, response in zip(prompts, responses)]"
    (tiny / "rewards.py").write_text(text.replace("[len(response.split()) for response in responses]", none))
    answer = cli("score", "first", "--engine", "hf", "--out", "run")
    assert answer.code == 0, answer.err
    assert "reward `words`: 6 of 30 responses have no score (6 abstained)" in " ".join(answer.out.split())
    sft, *_ = load_run(tiny / "run").points
    there = [len(text.split()) for prompt, text in zip(sft.prompts, sft.responses, strict=True) if prompt != "dog"]
    assert sft.means(["words"]) == pytest.approx([sum(there) / 12])
    found = json.loads(cli("score", "first", "--engine", "hf", "--out", "run", "--json").out)
    assert found["model"]["missing"] == {"words": {"responses": 15, "abstained": 3, "failed": 0}}


def test_a_reward_that_scores_nothing_stops_the_sweep_and_keeps_its_responses(tiny, monkeypatch):
    own = Scorer.score

    def score(self, prompts, *others):
        return own(self, prompts, *others) | {"words": [NAN] * len(prompts)}

    monkeypatch.setattr(Scorer, "score", score)
    with pytest.raises(UserError, match="sft, reward `words`: too few prompts(.|\n)*0 of 15 prompts; 15 of 15"):
        sweep(engine="hf", points=2)
    assert len(list((tiny / "sweep/drafts").iterdir())) == 5 and not list((tiny / "sweep").glob("points/*"))
    monkeypatch.setattr(Scorer, "score", own)
    monkeypatch.setattr("rewarded_lines.engines.transformers_engine.HfGenerator.generate", None)
    assert len(sweep(engine="hf", points=2).points) == 5

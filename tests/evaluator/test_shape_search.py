"""The search for a shape over depth: what it finds, keeps and refuses. Scores are invented, so it is fast."""

from __future__ import annotations

import inspect
import json
import sys
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

from rewarded_lines import search, sweep
from rewarded_lines.cli.search_command import search as typed_search
from rewarded_lines.config import PromptSpec, SweepSpec
from rewarded_lines.errors import UserError
from rewarded_lines.evaluator import shape_search
from rewarded_lines.evaluator.depth_shapes import ShapeSpace, natural_spline
from rewarded_lines.evaluator.evaluate import LocalEvaluator
from rewarded_lines.evaluator.records import Point, load_run, read_point
from rewarded_lines.evaluator.shape_options import ShapeOptions
from rewarded_lines.evaluator.shape_search import plan_shape
from rewarded_lines.merger.lines_schedule import lines_scale

optuna = pytest.importorskip("optuna")
VALIDATION = [f"a film {index}" for index in range(20)]


def scales(spec, blocks=4):
    """The scale of each block for each policy, [policies, blocks]; zero for SFT."""
    if not spec.weights:
        return np.zeros((2, blocks))
    lines = [spec.merge.schedule.line(policy) for policy in range(2)]
    return np.array([[line.at(block, blocks) for block in range(blocks)] for line in lines])


def late(spec):
    """Mean scores that gain from a large last block and lose by a large first one; KL grows with all scales."""
    weights = np.array(spec.weights or (0.0, 0.0))
    gain = scales(spec) @ np.array([-1.0, 0.0, 0.0, 1.0])
    return weights * (2.0 + gain) + 0.5 * weights.prod() * gain.sum(), float((weights @ scales(spec) ** 2).mean())


def nothing(spec):
    """The same for all merges with the same λ."""
    return np.array(spec.weights or (0.0, 0.0)), 0.1


class Invented:
    """Stands in for `LocalEvaluator.evaluate`; counts points, and dies after some if asked."""

    def __init__(self, means=late, die_after=10**9):
        self.means, self.left, self.made = means, die_after, []

    def __call__(self, evaluator, setup, keys, missing):
        specs = {key: spec for spec, key in reversed(keys.items())}
        for key in missing:
            if not self.left:
                raise KeyboardInterrupt
            self.left -= 1
            self.made.append((key, len(setup.prompts)))
            yield key, self.point(setup, specs[key])

    def point(self, setup, spec):
        count = len(setup.prompts)
        means, kl = self.means(spec)
        # Noise of the prompt alone, so that points are paired.
        noise = np.array([[hash_of(prompt), hash_of(prompt[::-1])] for prompt in setup.prompts])
        values = means + 0.1 * noise
        texts = ["words"] * count
        ones = np.ones(count, dtype=np.int64)
        return Point(
            spec=spec,
            prompts=list(setup.prompts),
            responses=texts,
            prompt_index=np.arange(count),
            seeds=ones,
            tokens=ones,
            ended=ones.astype(bool),
            kl=np.full(count, kl),
            scores={name: values[:, index] for index, name in enumerate(setup.rewards)},
        )


def hash_of(text):
    return sum(ord(char) * (place + 1) for place, char in enumerate(text)) % 101 / 101 - 0.5


@pytest.fixture
def ready(tiny, monkeypatch):
    """The tiny project with a sweep of invented scores, and validation prompts, two of them also test prompts."""
    (tiny / "test.jsonl").write_text("".join(json.dumps({"prompt": f"test {index}"}) + "\n" for index in range(12)))
    prompts = ["test 0", *VALIDATION, "test 1"]
    (tiny / "validation.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    path = tiny / "rewarded-lines.yaml"
    path.write_text(path.read_text() + "  resamples: 100\n  methods: [lines]\n")
    monkeypatch.setattr(LocalEvaluator, "evaluate", lambda *given: Invented()(*given))
    sweep(engine="hf")
    return tiny


def find(run="sweep", **given):
    """Search with few trials."""
    usual = {"shape": "linear", "knots": 3, "trials": 8, "validation": "validation.jsonl", "screen": 5}
    return search(run, **{**usual, **given})


@pytest.fixture
def invented(ready, monkeypatch):
    """Give an evaluator of its own to a test."""

    def use(*given, **named):
        one = Invented(*given, **named)
        monkeypatch.setattr(LocalEvaluator, "evaluate", lambda *args: one(*args))
        return one

    return use


def test_a_spline_is_the_one_of_the_book():
    # One inner knot: 4·m = 6·(0 − 2 + 0), and S(0.5) = 0.5 − 3·(0.125 − 0.5)/6.
    assert natural_spline(np.array([0.0, 1, 0]), np.array([0, 0.5, 1, 2])) == pytest.approx([0, 0.6875, 1, 0])
    heights, depths = np.array([1.0, 0.2, 2.0, 1.5, 0.0]), np.linspace(0, 4, 4001)
    values = natural_spline(heights, depths)
    bends = np.diff(values, 2) / 0.001**2
    # It goes through its knots, its ends are straight, and its second derivative is continuous and linear between.
    assert natural_spline(heights, np.arange(5.0)) == pytest.approx(heights)
    assert abs(bends[[0, -1]]).max() < 0.02 and abs(np.diff(bends)).max() < 0.02
    line = np.array([1.0, 1.5, 2.0, 2.5])
    assert natural_spline(line, np.linspace(0, 3, 7)) == pytest.approx(1 + np.linspace(0, 3, 7) / 2)


@pytest.mark.parametrize("kind", ["linear", "spline"])
def test_lines_is_a_shape_and_scales_stay_in_their_range(kind):
    numbers = (space := ShapeSpace(kind, 4, 2, 3.0)).straight(1.0, 1.0)
    expected = [round(lines_scale(block, 12, 1.0, 1.0), 2) for block in range(12)]
    assert [[round(scale, 2) for scale in row] for row in space.scales(numbers, 12)] == [expected, expected]
    both = space.scales([0, 3, 0, 3, 1, 1, 1, 1], 9)
    assert both[1] == [1.0] * 9 and min(both[0]) == 0 and max(both[0]) == 3 and len(both[0]) == 9
    assert space.straight(2.0, 9.0) == [2.0, 3.0, 3.0, 3.0] * 2


def test_it_finds_the_shape_measures_it_once_on_test_prompts_and_says_so(ready, invented):
    counted = invented()
    run, found = find(each_policy=True, trials=12)
    first, second = found.scales["first"], found.scales["second"]
    assert len(first) == 4 and first[-1] - first[0] > 1 and second[-1] - second[0] > 1
    # A straight line from 0 to 3 is the best shape here.
    assert [line.partition(":")[0] for line in found.verdict.splitlines()] == [
        "The shape is better than a constant scale with its norm",
        "The shape is not shown to be better than the best α and β of as many trials",
    ]
    assert [one.other for one in found.differences] == ["soup", "lines", "tuned", "shape-uniform"]
    volumes = {one.method: one.hypervolume.value for one in found.volumes}
    for one in found.differences:
        assert one.difference.value == pytest.approx(volumes["shape"] - volumes[one.other])
    # Of the test prompts: SFT and LiNeS were there, so four schedules of three λ are new.
    assert [count for _, count in counted.made].count(12) == 12
    assert all(point.prompts == [f"test {index}" for index in range(12)] for point in run.points)
    # Only there: validation prompts are no test prompts.
    on_validation = [p for p in map(read_point, (ready / "sweep/points").iterdir()) if p.prompts != run.sft.prompts]
    assert {prompt for point in on_validation for prompt in point.prompts} == set(VALIDATION)
    kept = json.loads(Path(found.file).read_text())
    assert len(kept["trials"]) == 12 and kept["found"]["verdict"] == found.verdict
    assert found.trials == (12, sum(one["hypervolume"] is not None for one in kept["trials"]))


def test_its_rows_are_methods_of_the_project_and_cost_nothing_more(ready, invented):
    _, found = find(each_policy=True, trials=2)
    path = ready / "rewarded-lines.yaml"
    content = yaml.safe_load(path.read_text())
    content["sweep"]["methods"] = {"lines": None, **yaml.safe_load(found.rows)}
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    run = sweep(engine="hf")
    assert run.header["evaluated_last"] == 0
    assert list(run.methods()) == ["lines", "shape", "shape-uniform", "shape-tuned"]
    for point in run.methods()["shape"]:
        assert scales(point.spec).tolist() == list(found.scales.values())


def test_only_promising_shapes_see_all_prompts(ready, invented):
    counted = invented()
    find()
    (file,) = (ready / "sweep/shapes").glob("linear-2-*.json")
    trials = json.loads(file.read_text())["trials"]
    for number, one in enumerate(trials):
        before = [other["screened"] for other in trials[:number]] or [one["screened"]]
        assert (one["hypervolume"] is not None) == (one["screened"] >= np.median(before))
    assert 0 < sum(one["hypervolume"] is None for one in trials) < 8
    sizes = [count for _, count in counted.made]
    assert sizes.count(15) < sizes.count(5) and set(sizes) == {5, 15, 12}
    # A whole trial is measured on both parts as if they were one.
    find(screen=0, trials=2)
    (other,) = set((ready / "sweep/shapes").glob("linear-2-*.json")) - {file}
    again = json.loads(other.read_text())["trials"]
    assert again[0]["numbers"] == trials[0]["numbers"] and all(one["hypervolume"] == one["screened"] for one in again)
    assert again[0]["hypervolume"] == pytest.approx(trials[0]["hypervolume"])


def test_the_weights_of_policies_for_mixtures_are_those_of_a_sweep(ready):
    path = ready / "rewarded-lines.yaml"
    path.write_text(path.read_text() + "mixtures: {first: {words: 1}, second: {words: 0.5, letters: 0.5}}\n")
    shape = find(trials=1, knots=2, screen=0)[0].methods()["shape"]
    assert [point.spec.weights for point in shape] == [(-1, 2), (0, 1), (1, 0)]


@pytest.mark.parametrize("low_kl", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_killed_it_goes_on_with_the_same_trials_and_repeats_none(ready, invented, monkeypatch, low_kl):
    monkeypatch.setattr("rewarded_lines.evaluator.shape_search._RANDOM", 2)
    sweep(engine="hf", out="killed")
    whole = invented()
    _, found = find(low_kl=low_kl, trials=7)
    made = []
    for _ in range(9):
        dying = invented(die_after=19)
        try:
            _, again = find("killed", low_kl=low_kl, trials=7)
        except KeyboardInterrupt:
            made += dying.made
        else:
            made += dying.made
            break
    assert len(made) == len(set(made)) and sorted(made) == sorted(whole.made)
    for kind in ("linear-2", "linear-3"):
        one, other = (next(Path(folder, "shapes").glob(f"{kind}-*")) for folder in ("sweep", "killed"))
        assert json.loads(one.read_text())["trials"] == json.loads(other.read_text())["trials"]
    assert again.scales == found.scales and again.volumes == found.volumes
    # More trials keep those that are there.
    more = invented()
    find(trials=8, low_kl=low_kl)
    assert len(json.loads(Path(found.file).read_text())["trials"]) == 8
    assert len([count for _, count in more.made if count == 5]) <= 6
    assert find(trials=1, low_kl=low_kl)[1].trials == (1, 1)


def test_the_kl_stays_below_its_ceiling(ready, invented):
    run, found = find(max_kl=2.0)
    assert found.kl["shape"] <= 2.0 < find()[1].kl["shape"]
    trials = json.loads(Path(found.file).read_text())["trials"]
    assert all(one["told"] == -one["kl"] / 2 for one in trials if one["kl"] > 2)
    for number, one in enumerate(trials):
        # Shapes above the ceiling do not screen those below it.
        before = [other["screened"] for other in trials[:number] if other["kl"] <= 2] or [one["screened"]]
        assert (one["hypervolume"] is not None) == (one["kl"] <= 2 and one["screened"] >= np.median(before))
    with pytest.raises(UserError, match="--max-kl: no schedule is below the ceiling"):
        find(max_kl=0.001)


def test_where_depth_does_not_matter_it_says_so(ready, invented, cli):
    invented(nothing)
    (ready / "sweep").rename(ready / "old")
    words = ["--config", "rewarded-lines.yaml", "--engine", "hf", "--shape", "spline", "--trials", 5]
    answer = cli("search", "new", *words, "--validation", "validation.jsonl")
    assert answer.code == 0, answer.err
    assert "not shown to be better than a constant scale" in answer.out and "the interval includes 0" in answer.out
    assert "schedule: [" in answer.out and list((ready / "new/shapes").glob("spline-4-*.png"))
    answer = cli("search", "new", *words[4:], "--validation", "validation.jsonl", "--json")
    told = json.loads(answer.out)["shape"]
    assert told["trials"][0] == 5 and len(told["scales"]["all"]) == 4 and answer.err == ""


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--shape", "linaer"], "did you mean `linear`"),
        (["--knots", 3], "--knots: an option of the search for a shape"),
        (["--shape", "linear", "--points", 4], "none of --method, --points and --gain"),
        (["--shape", "linear", "--knots", 5], "4 blocks"),
        (["--shape", "linear", "--most", "inf"], "--most: out of range"),
        (["--shape", "linear", "--knots", 7, "--each-policy"], "at most 12 numbers"),
        (["--shape", "linear", "--knots", 3, "--validation", "test.jsonl"], "validation prompts are test prompts"),
        (["--shape", "linear", "--knots", 3, "--validation", "none.jsonl"], "none.jsonl"),
        (
            ["--shape", "linear", "--sampler", "botorch", "--validation", "validation.jsonl"],
            "optuna-integration[botorch]",
        ),
        (["--shape", "spline"], "no validation prompts"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_made(ready, cli, monkeypatch, words, said):
    monkeypatch.setitem(sys.modules, "optuna_integration", None)
    answer = cli("search", "new", "--config", "rewarded-lines.yaml", "--engine", "hf", *words)
    assert answer.code == 1 and said in answer.err and answer.out == ""
    assert not (ready / "new").exists()


@pytest.mark.parametrize(("policies", "knots", "remedies"), [(7, 4, 1), (7, 20, 1), (6, 4, 2), (2, 13, 2)])
def test_remedies_for_too_many_numbers_work(monkeypatch, tmp_path, policies, knots, remedies):
    """Of as many policies as there are: each remedy is parsed from the message, and taken."""
    names = [f"policy{number}" for number in range(policies)]
    config = SimpleNamespace(policies=dict.fromkeys(names), prompts=PromptSpec(file="x.jsonl"), sweep=SweepSpec())
    depths = SimpleNamespace(stacks={"": 16})
    setup = SimpleNamespace(project=SimpleNamespace(config=config), plan=SimpleNamespace(depths=depths), prompts=[])
    monkeypatch.setattr(shape_search, "validation_rows", lambda *_: [{"prompt": "x"}])
    options = ShapeOptions("linear", knots=knots, each_policy=True, validation="x.jsonl")
    with pytest.raises(UserError) as caught:
        plan_shape(setup, options)
    said = caught.value.problems[0].remedy.split(", or ")
    assert len(said) == remedies
    for remedy in said:
        change = {"each_policy": False} if "leave --each-policy out" in remedy else {}
        change |= {"knots": int(number)} if (number := remedy.partition("--knots ")[2]) else {}
        space, _ = plan_shape(setup, replace(options, **change))
        assert space.knots * space.curves <= 12


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_botorch_proposes_the_most_expected_hypervolume_improvement(seed):
    """Two objectives: the proposal's improvement, by draws from the posterior, is about the best of a grid's."""
    pytest.importorskip("optuna_integration.botorch")
    import torch
    from botorch.fit import fit_gpytorch_mll
    from botorch.models import SingleTaskGP
    from botorch.models.transforms import Standardize
    from gpytorch.mlls import ExactMarginalLogLikelihood

    drawn, study = np.random.default_rng(seed), optuna.create_study(directions=["maximize", "minimize"])
    ranges = {f"scale {number}": optuna.distributions.FloatDistribution(0.0, 3.0) for number in range(2)}
    places = np.round(drawn.uniform(0, 3, (14, 2)), 2)
    values = np.stack([np.sin(places[:, 0]) + places[:, 1] / 2, (places**2).mean(axis=1)], axis=1)
    for place, told in zip(places, values, strict=True):
        params = dict(zip(ranges, place.tolist(), strict=True))
        study.add_trial(optuna.create_trial(params=params, distributions=ranges, values=told.tolist()))
    study.sampler = shape_search._sampler(ShapeOptions("linear", sampler="botorch", low_kl=True, seed=seed), 14)
    found = list(study.ask(ranges).params.values())

    sought = torch.tensor(values * [1, -1])
    model = SingleTaskGP(torch.tensor(places / 3), sought, outcome_transform=Standardize(2))
    fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
    line = np.linspace(0, 3, 31)
    grid = np.array([found, *((x, y) for x in line for y in line)])
    with torch.no_grad():
        posterior = model.posterior(torch.tensor(grid / 3))
        mean, spread = posterior.mean.numpy(), posterior.variance.sqrt().numpy()
    normal, least = drawn.standard_normal((4000, 1, 2)), sought.numpy().min(axis=0)
    draws = mean + spread * normal
    # What lies above the worst values and below no known point: the area that a draw adds, by strips between points.
    known = sorted({tuple(one) for one in sought.numpy().tolist()}, reverse=True)
    gained, height, edges = np.zeros(draws.shape[:2]), least[1], [*(x for x, _ in known), least[0]]
    top = np.maximum(draws[..., 0] - edges[0], 0) * np.maximum(draws[..., 1] - least[1], 0)
    gained += top
    for (right, level), left in zip(known, edges[1:], strict=True):
        height = max(height, level)
        width = np.clip(draws[..., 0], left, right) - left
        gained += width * np.maximum(draws[..., 1] - height, 0)
    improvement = gained.mean(axis=0)
    assert improvement[0] >= 0.9 * improvement.max() > 0


def test_every_option_is_one_of_the_verb_and_of_its_command():
    ours, typed = inspect.signature(search).parameters, inspect.signature(typed_search).parameters
    for one in fields(ShapeOptions):
        assert ours[one.name].default == typed[one.name].default == one.default


@pytest.mark.slow
def test_with_real_models_from_the_command_line(tiny, cli):
    rows = [json.dumps({"prompt": f"a film {index}"}) + "\n" for index in range(12)]
    (tiny / "validation.jsonl").write_text("".join(rows))
    sweep(engine="hf")
    words = ["--shape", "spline", "--trials", 6, "--validation", "validation.jsonl", "--screen", 4, "--each-policy"]
    answer = cli("search", "sweep", *words, "--json")
    assert answer.code == 0, answer.err
    told = json.loads(answer.out)["shape"]
    assert [one["method"] for one in told["volumes"]] == ["soup", "lines", "tuned", "shape-uniform", "shape"]
    assert len(load_run("sweep").points) == 7 and list((tiny / "sweep/shapes").glob("spline-8-*.png"))
    again = cli("search", "sweep", *words, "--json")
    assert json.loads(again.out) == json.loads(answer.out)

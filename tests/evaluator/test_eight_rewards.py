"""Eight policies and eight rewards, from the sweep to the merge of the chosen policy, on tiny models."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from progress_told import Told
from tiny_models import make_model, perturb, save_model

from rewarded_lines import choose, merge, report, search, sweep
from rewarded_lines.config import GenerationSpec
from rewarded_lines.engines.load_engine import load_generator
from rewarded_lines.errors import UserError
from rewarded_lines.evaluator.records import load_run
from rewarded_lines.evaluator.tune import worth
from rewarded_lines.evaluator.weight_designs import spread
from rewarded_lines.pareto.hypervolume import contributions, hypervolume
from rewarded_lines.reports.summary import summarise

NAMES = [f"p{index}" for index in range(8)]
# Each reward counts the characters of one group, per hundred.
GROUPS = [f"group {place}" for place in range(8)]
PROJECT = {
    "base": "sft",
    "policies": {name: name for name in NAMES},
    "rewards": {name: {"function": f"groups.py:reward_{place}"} for place, name in enumerate(GROUPS)},
    "prompts": {"file": "test.jsonl", "limit": 6},
    "generation": {"max_tokens": 12},
    "sweep": {"points": 11, "methods": ["soup"], "resamples": 100},
}
REWARD = """\
def reward_{place}(prompts, responses):
    return [100 * sum(ord(one) % 8 == {place} for one in text) / (1 + len(text)) for text in responses]
"""

BEST = """\
def reward_0(prompts, responses):
    return [100 if text in BEST else plain([], [text])[0] for text in responses]
"""


@pytest.fixture(scope="module")
def swept(tiny_source, tmp_path_factory) -> Path:
    """A project whose sweep of 11 λ is done, made once."""
    folder = tmp_path_factory.mktemp("eight") / "eight"
    shutil.copytree(tiny_source, folder)
    for seed, name in enumerate(NAMES, start=1):
        save_model(perturb(make_model(0), seed), folder / name)
    (folder / "groups.py").write_text("\n\n".join(REWARD.format(place=place) for place in range(8)))
    # JSON is YAML.
    (folder / "rewarded-lines.yaml").write_text(json.dumps(PROJECT))
    told = Told()
    sweep(folder / "rewarded-lines.yaml", engine="hf", progress=told)
    assert told.facts == ["6 prompts for each of 12 points: 1 of sft, 11 of soup"]
    return folder


@pytest.fixture
def eight(swept, tmp_path, monkeypatch) -> Path:
    """A copy of it, as the working directory."""
    shutil.copytree(swept, tmp_path / "eight")
    monkeypatch.chdir(tmp_path / "eight")
    return tmp_path / "eight"


def answers(model: Path | str, prompts: list[str]) -> list[str]:
    spec = GenerationSpec(max_tokens=12)
    (responses,) = load_generator("hf", str(model), spec, prompts).generate(prompts, spec)
    return [response.text for response in responses]


def test_points_are_the_merges_at_the_λ_of_the_design(eight):
    run = load_run(eight / "sweep")
    points = run.methods()["soup"]
    assert {point.spec.weights for point in points} == set(spread(8, 11))
    for weights in (spread(8, 11)[8], spread(8, 11)[-1]):
        merge("sft", NAMES, weights, beta=0, out="direct", overwrite=True)
        (point,) = [point for point in points if point.spec.weights == weights]
        assert point.responses == answers("direct", run.sft.prompts)
        for place, name in enumerate(GROUPS):
            shares = [sum(ord(one) % 8 == place for one in text) / (1 + len(text)) for text in point.responses]
            assert point.scores[name] == pytest.approx(100 * np.array(shares))


def test_more_points_keep_the_earlier_ones_and_fewer_than_policies_are_refused(eight, cli):
    run = sweep(engine="hf", points=12)
    assert run.header["evaluated_last"] == 1 and len(run.points) == 13
    assert {point.spec.weights for point in run.methods()["soup"]} == set(spread(8, 12))
    said = cli("sweep", "--engine", "hf", "--points", 7)
    assert said.code == 1 and "8 or more" in said.err and "--points" in said.err
    # Fewer are a part of them.
    assert sweep(engine="hf", points=9).header["evaluated_last"] == 0


def test_the_report_has_the_exact_volumes(eight):
    summary = report("sweep", formats=["png"])
    run = load_run("sweep")
    means = {point.spec.weights: point.means(run.objectives) for point in run.methods()["soup"]}
    sft, values = run.sft.means(run.objectives), np.array(list(means.values()))
    volumes = {row.reference: row for row in summary.hypervolumes}
    assert volumes["sft"].hypervolume.value == pytest.approx(hypervolume(values, sft))
    worst = np.minimum(values.min(axis=0), sft)
    assert volumes["worst"].hypervolume.value == pytest.approx(hypervolume(values, worst))
    assert all(row.error == row.resample_error == 0 for row in summary.hypervolumes)
    shares = [point.contribution for point in summary.methods()["soup"]]
    assert shares == pytest.approx(contributions(values, sft).tolist())
    made = {path.name for path in (eight / "sweep/report").iterdir()}
    assert {"front.png", "kl.png", "parallel.png", "table.md", "summary.json"} <= made
    few = summarise(run, resamples=120)
    assert few.resamples == 120 and few.hypervolumes[0].hypervolume.value == summary.hypervolumes[0].hypervolume.value
    with pytest.raises(UserError, match="too few resamples"):
        report("sweep", resamples=20)


def test_the_chosen_policy_is_what_its_command_merges(eight, cli):
    run = load_run("sweep")
    names, sft = run.objectives, np.stack([run.sft.scores[name] for name in run.objectives])
    weights = {names[0]: 2.0, names[3]: 1.0, names[7]: 0.5}
    points = run.methods()["soup"]
    # Σ w (mean − SFT's mean)/(SFT's deviation), by hand.
    spread_ = np.where(sft.std(axis=1) > 0, sft.std(axis=1), 1.0)
    gains = [(np.array(point.means(names)) - sft.mean(axis=1)) / spread_ for point in points]
    worth = [sum(weights.get(name, 0) * gain for name, gain in zip(names, one, strict=True)) for one in gains]
    floor = float(np.median([point.means([names[1]])[0] for point in points]))
    allowed = [place for place, point in enumerate(points) if point.means([names[1]])[0] >= floor]
    best = points[max(allowed, key=lambda place: worth[place])]
    words = ["--weights", ",".join(f"{name}={weight}" for name, weight in weights.items())]
    answer = cli("choose", "sweep", *words, "--at-least", f"{names[1]}={floor!r}")
    assert answer.code == 0, answer.err
    command = answer.out.splitlines()[-1]
    made = cli(*shlex.split(command)[1:])
    assert made.code == 0, made.err
    assert answers("chosen", run.sft.prompts) == best.responses
    unknown = cli("choose", "sweep", "--maximize", "grup 1")
    assert unknown.code == 1 and all(name in unknown.err for name in names)
    assert choose("sweep", weights=weights, at_least={names[1]: floor}).point.weights == best.spec.weights


def test_search_adds_λ_or_says_how_many_it_needs(eight, cli):
    _, (found,) = search("sweep", points=13, gain=0)
    assert (found.points, found.added, found.reason, found.error) == (13, 2, "points", 0)
    assert found.above == "sft" and found.hypervolume == pytest.approx(hypervolume(*_front(load_run("sweep"))))
    said = cli("search", "other", "--config", "rewarded-lines.yaml", "--engine", "hf", "--points", 8)
    assert said.code == 1 and "9 or more for 8 policies" in said.err and not Path("other").exists()


def _front(run):
    return [point.means(run.objectives) for point in run.methods()["soup"]], run.sft.means(run.objectives)


def test_search_goes_on_where_no_λ_can_be_above_sft_on_every_reward(eight, cli):
    # SFT's own responses have most of the first reward.
    code = Path("groups.py").read_text().replace("reward_0", "plain")
    Path("groups.py").write_text(f"{code}\n\nBEST = {load_run('sweep').sft.responses}\n{BEST}")
    sweep(engine="hf", out="run")
    run, (found,) = search("run", points=13, gain=0)
    assert (found.points, found.added, found.above) == (13, 2, "worst")
    means, sft = _front(run)
    assert hypervolume(means, sft) == 0
    single = [point.means(run.objectives) for point in run.methods()["soup"] if max(point.spec.weights) == 1]
    low = np.min([*single, sft], axis=0)
    assert len(single) == 8 and found.hypervolume == pytest.approx(hypervolume(means, low))
    assert "above the worst of SFT and the policies" in cli("search", "run", "--points", 13).out


def test_a_run_of_an_earlier_version_is_asked_which_design_it_has(eight):
    header = json.loads(Path("sweep/run.json").read_text())
    del header["sweep"]["design"]
    Path("sweep/run.json").write_text(json.dumps(header))
    with pytest.raises(UserError, match="design: lattice"):
        sweep(engine="hf")
    project = {**PROJECT, "sweep": {**PROJECT["sweep"], "design": "spread"}}
    Path("rewarded-lines.yaml").write_text(json.dumps(project))
    assert sweep(engine="hf").header["evaluated_last"] == 0


def test_tuning_prefers_the_front_that_is_least_below_sft(eight):
    run = load_run("sweep")
    _, sft = _front(run)
    deviations = np.array([run.sft.scores[name].std() for name in run.objectives])
    # Half a deviation short in one reward, nothing short in others; and one deviation in all.
    above = [np.array(sft) + deviations]
    assert worth(above, run.sft, run.objectives) == pytest.approx(deviations.prod())
    fronts = [[np.array(sft) - 0.5 * deviations * (np.arange(8) == 3)], [np.array(sft) - deviations]]
    assert [worth(one, run.sft, run.objectives) for one in fronts] == pytest.approx([-0.5, -1])

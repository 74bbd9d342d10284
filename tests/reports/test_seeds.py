"""Runs of several training seeds: averages, the second level of the bootstrap, and runs that do not go together."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rewarded_lines.errors import UserError
from rewarded_lines.evaluator.records import load_run, read_point, write_point
from rewarded_lines.pareto.bootstrap import interval, resample_means
from rewarded_lines.pareto.hypervolume import hypervolume
from rewarded_lines.reports.summary import Summary, summarise
from rewarded_lines.reports.texts import scope_note

MakeRun = Callable[..., Path]


@pytest.fixture
def seeds(make_run: MakeRun, tmp_path: Path) -> Callable[..., list[Path]]:
    """Copies of one run, the scores of whose policies are shifted as other training would shift them."""

    def make(*shifts: float, **options: object) -> list[Path]:
        first = make_run(**{"points": 3, "prompts": 64, "resamples": 200, **options})
        folders = []
        for index, shift in enumerate(shifts):
            folders.append(shutil.copytree(first, tmp_path / f"seed{index}"))
            for path in (folders[-1] / "points").iterdir():
                point = read_point(path)
                if point.spec.weights:
                    scores = {name: values + shift for name, values in point.scores.items()}
                    write_point(path, replace(point, scores=scores))
        return folders

    return make


def edit(folder: Path, change: Callable[[dict], object]) -> None:
    header = json.loads((folder / "run.json").read_text())
    change(header)
    (folder / "run.json").write_text(json.dumps(header))


def summary_of(folders: list[Path]) -> Summary:
    return summarise([load_run(folder) for folder in folders])


def test_means_and_hypervolumes_are_averages(seeds: Callable[..., list[Path]]) -> None:
    folders = seeds(0.0, 0.3, -0.1)
    each, together = [summary_of([folder]) for folder in folders], summary_of(folders)
    assert (together.runs, each[0].runs) == (3, 1)
    for index, point in enumerate(together.points):
        for name, estimate in point.rewards.items():
            values = [one.points[index].rewards[name].value for one in each]
            assert estimate.value == pytest.approx(np.mean(values))
        assert point.contribution == pytest.approx(np.mean([one.points[index].contribution for one in each]))
    for index, row in enumerate(together.hypervolumes):
        assert row.hypervolume.value == pytest.approx(
            np.mean([one.hypervolumes[index].hypervolume.value for one in each])
        )
    for row, *others in zip(together.policy_gains, *(one.policy_gains for one in each), strict=True):
        for name, estimate in row.rewards.items():
            assert estimate.value == pytest.approx(np.mean([other.rewards[name].value for other in others]))


def test_runs_that_differ_make_intervals_wider(seeds: Callable[..., list[Path]]) -> None:
    def width(summary: Summary) -> float:
        estimate = summary.methods()["soup"][1].rewards["positive"]
        assert estimate.low <= estimate.value <= estimate.high
        return estimate.high - estimate.low

    apart = seeds(0.0, 0.8, -0.8)
    one = width(summary_of(apart[:1]))
    assert width(summary_of(apart)) > 2 * one
    for folder in apart:
        shutil.rmtree(folder)
    # Of runs that are alike there is no variance of training to be seen.
    assert width(summary_of(seeds(0.0, 0.0, 0.0))) == pytest.approx(one)


def test_one_run_is_a_plain_bootstrap_over_prompts(make_run: MakeRun) -> None:
    run = load_run(make_run(points=3, prompts=64, resamples=200))
    summary = summarise(run)
    points = [run.sft, *(point for method in run.methods().values() for point in method)]
    scores = np.stack([np.stack(list(point.scores.values()), axis=1) for point in points])
    resampled = resample_means(scores, 200, 0)
    for index, point in enumerate(summary.points):
        for column, estimate in enumerate(point.rewards.values()):
            low, high = interval(resampled[:, index, column])
            assert (estimate.value, estimate.low, estimate.high) == pytest.approx(
                (scores[index, :, column].mean(), low, high), rel=1e-12
            )
    soup = [index for index, point in enumerate(points) if point.spec.method == "soup"]
    volumes = [hypervolume(sample[soup], sample[0]) for sample in resampled]
    (row,) = [one for one in summary.hypervolumes if (one.method, one.reference) == ("soup", "sft")]
    assert row.hypervolume.value == pytest.approx(hypervolume(scores.mean(axis=1)[soup], scores.mean(axis=1)[0]))
    assert (row.hypervolume.low, row.hypervolume.high) == pytest.approx(tuple(interval(volumes)))
    assert summarise([run]) == summary


def test_matched_alphas_may_differ(seeds: Callable[..., list[Path]]) -> None:
    folders = seeds(0.0, 0.0)

    def match(header: dict) -> None:
        for entry in header["points"]:
            if entry["method"] == "soup":
                entry["alpha"] = 1.5

    edit(folders[1], match)
    summary = summary_of(folders)
    assert {point.merge.alpha for point in summary.methods()["soup"]} == {1.25} and len(summary.points) == 7


def test_the_points_that_all_runs_have_are_compared(seeds: Callable[..., list[Path]]) -> None:
    folders = seeds(0.0, 0.1)
    edit(folders[1], lambda header: header["points"].pop())
    summary = summary_of(folders)
    assert [len(points) for points in summary.methods().values()] == [3, 2]
    assert "1 of 7 points are not in every run" in scope_note(summary)
    assert "2 training runs and 64 prompts" in scope_note(summary)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda header: header["rewards"].pop("positive"), "(?s)different rewards.*detailed"),
        (lambda header: header["rewards"]["positive"].update(role="audit"), r"(?s)different rewards.*\(audit\)"),
        (
            lambda header: header.update(policies=dict(reversed(header["policies"].items()))),
            "(?s)different policies.*cheerful, detailed; detailed, cheerful",
        ),
        (
            lambda header: [entry.update(method="other") for entry in header["points"][1:]],
            "no point in common",
        ),
    ],
)
def test_runs_that_do_not_go_together(
    seeds: Callable[..., list[Path]], change: Callable[[dict], object], said: str
) -> None:
    folders = seeds(0.0, 0.0)
    edit(folders[1], change)
    with pytest.raises(UserError, match=said) as caught:
        summary_of(folders)
    assert all(str(folder) in str(caught.value) for folder in folders)


def test_runs_of_other_prompts(seeds: Callable[..., list[Path]]) -> None:
    folders = seeds(0.0, 0.0)
    for path in (folders[1] / "points").iterdir():
        point = read_point(path)
        write_point(path, replace(point, prompts=[f"other {prompt}" for prompt in point.prompts]))
    with pytest.raises(UserError, match="different prompts"):
        summary_of(folders)


def test_the_same_run_twice(seeds: Callable[..., list[Path]]) -> None:
    (folder,) = seeds(0.0)
    with pytest.raises(UserError, match="named twice"):
        summary_of([folder, folder / ".." / folder.name])


def test_the_command(seeds: Callable[..., list[Path]], cli: Callable) -> None:
    pytest.importorskip("matplotlib")
    folders = seeds(0.0, 0.2)
    answer = cli("report", *folders, "--format", "svg")
    assert answer.code == 0, answer.err
    # On whatever lines they come to stand.
    assert "2 training runs and 64 prompts" in " ".join(answer.out.split())
    assert (folders[0] / "report/front.svg").is_file() and not (folders[1] / "report").exists()
    told = json.loads(cli("report", *folders, "--json", "--format", "svg").out)
    assert told == json.loads(json.dumps(summary_of(folders).as_dict())) and told["runs"] == 2
    edit(folders[1], lambda header: header["rewards"].pop("positive"))
    answer = cli("report", *folders)
    assert answer.code == 1 and answer.out == "" and "different rewards" in answer.err

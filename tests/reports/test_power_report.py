"""What `report --power` says: of a pair by hand, of runs of several seeds, and what it refuses."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from rewarded_lines.errors import UserError
from rewarded_lines.evaluator.paired_scores import tabulate
from rewarded_lines.evaluator.records import load_run, read_point, write_point
from rewarded_lines.pareto.hypervolume import hypervolumes
from rewarded_lines.pareto.power import FACTOR
from rewarded_lines.reports.detectable import Detectable
from rewarded_lines.reports.requested_tables import found_sentence, power_sheet
from rewarded_lines.reports.summary import Summary, summarise
from rewarded_lines.reports.tables import markdown

MakeRun = Callable[..., Path]


def row(summary: Summary, measure: str = "hypervolume", at: str = "sft") -> Detectable:
    (found,) = [one for one in summary.power if (one.measure, one.at) == (measure, at)]
    return found


@pytest.fixture(scope="module")
def one_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from invented_runs import synthetic_run

    return synthetic_run(tmp_path_factory.mktemp("power") / "run", points=3, prompts=64, resamples=300)


def test_the_error_is_that_of_the_paired_bootstrap(one_run: Path) -> None:
    run = load_run(one_run)
    found, table = row(summarise(run, power=True)), tabulate([run])
    fronts, sft = table.fronts(), table.scores[:, 0, 0]
    change = hypervolumes(fronts["lines"][:, 0], sft) - hypervolumes(fronts["soup"][:, 0], sft)
    assert (found.method, found.other) == ("lines", "soup")
    assert found.difference.value == found.size == change[0]
    # As of a mean of 64 prompts: the bootstrap's own is √(63/64) of it.
    assert found.standard_error == pytest.approx(change[1:].std(ddof=1) * np.sqrt(64 / 63))
    assert found.least.value == pytest.approx(FACTOR * found.standard_error) == found.least.high
    assert found.prompts_needed == np.ceil(64 * (found.least.value / found.size) ** 2) and found.runs_needed is None


def test_rewards_are_compared_at_the_middle(one_run: Path) -> None:
    run = load_run(one_run)
    found = row(summarise(run, power="10%"), "detailed", "λ = 0.5")
    soup, lines = (next(one for one in run.methods()[name] if one.spec.weights[0] == 0.5) for name in ("soup", "lines"))
    change = lines.scores["detailed"] - soup.scores["detailed"]
    assert found.difference.value == pytest.approx(change.mean())
    assert found.standard_error == pytest.approx(change.std(ddof=1) / 8, rel=0.15)
    assert found.size == abs(found.difference.value)


def test_a_size_is_absolute_or_a_share(one_run: Path) -> None:
    run = load_run(one_run)
    (soup, *_) = [one.hypervolume.value for one in summarise(run).hypervolumes]
    tenth, two = row(summarise(run, power="10%")), row(summarise(run, power=2))
    assert (tenth.size, two.size) == (pytest.approx(soup / 10), 2.0)
    assert tenth.prompts_needed != two.prompts_needed
    assert not summarise(run).power and "power" not in summarise(run).as_dict()


def runs_apart(first: Path, folder: Path, *shifts: float) -> list[Path]:
    """Return copies of a run; the scores of `lines` are shifted as other training would shift them."""
    found = [shutil.copytree(first, folder / f"seed{index}") for index in range(len(shifts))]
    for copy, shift in zip(found, shifts, strict=True):
        for path in (copy / "points").iterdir():
            # A record does not hold the method's name.
            if (point := read_point(path)).spec.merge.beta:
                write_point(path, replace(point, scores={name: one + shift for name, one in point.scores.items()}))
    return found


def test_of_several_runs_both_numbers_are_said(one_run: Path, tmp_path: Path) -> None:
    apart = [load_run(folder) for folder in runs_apart(one_run, tmp_path, 0.0, 0.2, 0.1)]
    found = row(summarise(apart, power=True))
    assert found.variances.seed is not None and found.variances.runs == 3
    # The copies have the same scores but for the shifts, so that little is a run's own: larger fronts vary more.
    assert found.variances.residual < 0.1 * found.variances.prompt
    assert found.least.low < found.least.value < found.least.high
    assert found.runs_needed is not None and found.prompts_needed is not None
    assert "| runs |" in markdown(summarise(apart, power=True))


def test_a_difference_that_was_not_found_says_how_small_it_is(one_run: Path) -> None:
    summary = summarise(load_run(one_run), power=True)
    found = replace(row(summary), difference=replace(row(summary).difference, value=0.2, low=-0.4, high=0.8))
    assert not found.found and row(summary).found
    assert found_sentence(found).startswith("lines − soup, above sft: 0.20 [-0.40, 0.80]. A difference of ")
    assert found_sentence(found).endswith(" or more would have been found with 80% power.")
    assert found_sentence(found) in markdown(replace(summary, power=[found]))


def test_what_never_varies_is_no_proof(make_run: MakeRun) -> None:
    """Nothing is above SFT: 0 in every resample, which says nothing of how small a difference is."""
    found = row(summarise(load_run(make_run(points=2, prompts=16, resamples=100, gain=-1.0)), power="10%"))
    assert (found.difference.value, found.standard_error, found.size, found.prompts_needed) == (0, 0, 0, None)
    assert "would have been found" not in found_sentence(found) and "these prompts cannot say" in found_sentence(found)


@pytest.mark.parametrize("width", [60, 80, 100])
def test_no_terminal_cuts_a_column(one_run: Path, width: int) -> None:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(power_sheet(summarise(load_run(one_run), power="10%")))
    text = console.export_text()
    assert all(word in text.split() for word in ("measured", "difference", "least", "size", "prompts"))


def test_the_command(one_run: Path, tmp_path: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    # Figures and page take seconds.
    monkeypatch.setattr("rewarded_lines.reports.report.figures", lambda *given: ())
    monkeypatch.setattr("rewarded_lines.reports.report.lacking", lambda: "no page")
    run = shutil.copytree(one_run, tmp_path / "run")
    answer = cli("report", run, "--power", "--size", "10%", "--format", "svg")
    assert answer.code == 0, answer.err
    assert "What the run could find" in answer.out and "80% power" in answer.out
    told = json.loads((run / "report/summary.json").read_text())["power"]
    assert {one["at"] for one in told} == {"sft", "worst", "λ = 0.5"}
    assert "What the run could find" in (run / "report/table.md").read_text()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--power", "--size", "0"], "not a size to plan for"),
        (["--power", "--size", "-5%"], "got: -5%"),
        (["--power", "--size", "much"], "got: much"),
        (["--size", "5"], "only with --power"),
    ],
)
def test_sizes_that_cannot_be_are_refused(
    one_run: Path, cli: Callable[..., Any], options: list[str], said: str
) -> None:
    answer = cli("report", one_run, *options)
    assert answer.code == 1 and said in answer.err and "Traceback" not in answer.err
    assert not (one_run / "report").exists()


def test_runs_that_show_no_variance_or_no_pair_are_refused(make_run: MakeRun, one_run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the run has 1 method"):
        summarise(load_run(make_run(methods={"soup": (1.0, 0.0)}, points=2, prompts=8, resamples=100)), power=True)
    other = shutil.copytree(one_run, tmp_path / "other")
    header = json.loads((other / "run.json").read_text())
    header["points"] = [one for one in header["points"] if one["method"] != "lines"]
    (other / "run.json").write_text(json.dumps(header))
    with pytest.raises(UserError, match="no point of lines is in every run"):
        summarise([load_run(one_run), load_run(other)], power=True)


def test_one_prompt_is_refused(make_run: MakeRun) -> None:
    run = load_run(make_run(points=2, prompts=1, resamples=100))
    assert summarise(run).prompts == 1
    with pytest.raises(UserError, match="one prompt shows no variance"):
        summarise(run, power=True)

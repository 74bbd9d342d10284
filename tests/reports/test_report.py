"""The verb and its command, through a run folder on disk."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from rewarded_lines.cli.report_command import report as command
from rewarded_lines.errors import UserError
from rewarded_lines.reports.report import PAGE, TABLES, report, report_files

pytest.importorskip("matplotlib")
MakeRun = Callable[..., Path]
FILES = (*TABLES, PAGE, "front.png", "front.svg", "kl.png", "kl.svg")


@pytest.fixture
def app() -> typer.Typer:
    made = typer.Typer()
    made.command()(command)
    return made


def test_every_file_is_written_and_nothing_else_and_the_command_prints_tables_and_paths(
    make_run: MakeRun, app: typer.Typer
) -> None:
    run = make_run(points=3, resamples=100)
    result = CliRunner().invoke(app, [str(run)])
    assert result.exit_code == 0, result.output
    for expected in ("Points", "Hypervolume [logit × words]", "Policies against SFT", "100 resamples"):
        assert expected in result.output
    assert all(str(run / "report" / name) in result.output for name in FILES)
    written = {path.name: path.read_bytes() for path in (run / "report").iterdir()}
    assert sorted(written) == sorted(FILES)
    assert written["front.png"].startswith(b"\x89PNG")
    assert written["front.svg"].startswith(b"<?xml")
    assert written["table.md"].startswith(b"# synthetic")
    assert written["points.csv"].count(b"\n") == 8


def test_a_run_has_the_figures_that_it_has_data_for(make_run: MakeRun) -> None:
    run = make_run(points=2, resamples=20, prompts=32, rewards=4, policies=3, control=1.0)
    header = json.loads((run / "run.json").read_text())
    header["policies"]["kind"]["path"] = "../kind"
    (run / "run.json").write_text(json.dumps(header))
    (run.parent / "kind").mkdir()
    (run.parent / "kind/metrics.jsonl").write_text('{"step": 1, "reward": 0.5}\n{"step": 2, "reward": 0.7}\n')
    summary = report(run, formats=["svg"], style="grey")
    assert json.loads((run / "report/summary.json").read_text()) == json.loads(json.dumps(summary.as_dict()))
    figures = ("front", "kl", "forgetting", "simplex", "parallel", "training")
    assert [path.name for path in report_files(run)] == [*TABLES, PAGE, *(f"{name}.svg" for name in figures)]


def test_the_depth_of_a_run_is_drawn_when_asked_for(make_run: MakeRun, tiny: Path) -> None:
    run = make_run(points=2, resamples=20, prompts=8)
    header = json.loads((run / "run.json").read_text())
    header["base"] = {"path": str(tiny / "sft")}
    header["policies"] = {name: {"path": str(tiny / name)} for name in ("first", "second")}
    (run / "run.json").write_text(json.dumps(header))
    report(run, formats=["svg"], depth=True)
    drawn = (run / "report/depth.svg").read_text()
    assert "residual τ of first" in drawn and "lines: α = 1, β = 1" in drawn


def test_depth_without_the_weights_is_refused(make_run: MakeRun) -> None:
    run = make_run(points=2, resamples=20, prompts=8)
    header = json.loads((run / "run.json").read_text())
    header["base"] = {"path": "../gone"}
    (run / "run.json").write_text(json.dumps(header))
    with pytest.raises(UserError):
        report(run, formats=["svg"], depth=True)
    header["policies"] = {}
    (run / "run.json").write_text(json.dumps(header))
    with pytest.raises(UserError, match="names no policies"):
        report(run, formats=["svg"], depth=True)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--style", "papier"], "did you mean `paper`?"),
        (["--format", "pfd"], "did you mean `pdf`?"),
        (["--style", "gone.mplstyle"], "no such style"),
    ],
)
def test_unknown_styles_and_formats_are_refused_before_any_work(
    make_run: MakeRun, cli: Callable[..., Any], options: list[str], expected: str
) -> None:
    run = make_run(points=2, resamples=20, prompts=8)
    answer = cli("report", run, *options)
    assert answer.code == 1 and expected in answer.err and "Traceback" not in answer.err
    assert not (run / "report").exists()


def test_format_and_style_through_the_command(make_run: MakeRun, cli: Callable[..., Any], tmp_path: Path) -> None:
    run = make_run(points=2, resamples=20, prompts=8)
    (tmp_path / "mine.mplstyle").write_text("font.size: 11\n")
    answer = cli("report", run, "--format", "pdf", "--format", "png", "--style", tmp_path / "mine.mplstyle")
    assert answer.code == 0, answer.err
    assert (run / "report/front.pdf").read_bytes().startswith(b"%PDF")
    assert not (run / "report/front.svg").exists() and str(run / "report/kl.pdf") in answer.out


@pytest.mark.slow
def test_a_second_report_writes_the_same_bytes(make_run: MakeRun) -> None:
    run = make_run(points=3, resamples=100)
    folder = run / "report"
    report(str(run))
    first = {name: (folder / name).read_bytes() for name in FILES}
    report(str(run))
    assert {name: (folder / name).read_bytes() for name in FILES} == first


def test_without_matplotlib_the_numbers_are_kept(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(points=3, resamples=100)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="matplotlib"):
        report(run)
    assert sorted(path.name for path in (run / "report").iterdir()) == [
        "points.csv",
        "summary.json",
        "table.md",
    ]


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a run folder"):
        report(tmp_path)
    assert not (tmp_path / "report").exists()

"""The logs of training that stand beside policies: found where the run says, left out where they are not whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rewarded_lines.evaluator.records import Run
from rewarded_lines.folders import METRICS_FILE
from rewarded_lines.reports.figures.training_curves import Training, read_trainings

LINES = [
    {"step": 0, "max_steps": 2, "seconds": 0.1},
    {"step": 1, "max_steps": 2, "seconds": 1.0, "reward": -0.5, "kl": 0.0},
    {"step": 2, "max_steps": 2, "seconds": 2.0, "reward": 0.5},
]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "sweep", {"policies": {"kind": {"path": "../kind"}, "gone": {"path": "org/gone"}}}, [])


def write(folder: Path, lines: list[str], standardized: dict[str, dict[str, float]] | None = None) -> None:
    folder.mkdir(exist_ok=True)
    (folder / METRICS_FILE).write_text("".join(line + "\n" for line in lines))
    if standardized is not None:
        (folder / "training.json").write_text(json.dumps({"standardized": standardized}))


def read(run: Run) -> Training:
    (found,) = read_trainings([run])
    return found


def test_values_stand_beside_their_steps(run: Run, tmp_path: Path) -> None:
    run.folder.mkdir()
    write(tmp_path / "kind", [json.dumps(line) for line in LINES], {"kind": {"mean": 0.0, "deviation": 2.0}})
    found = read(run)
    assert (found.policy, found.run, found.standardized) == ("kind", 0, True)
    assert [line["step"] for line in found.lines] == [0, 1, 2]
    assert found.measured(["other", "reward"]) == ([1, 2], [-0.5, 0.5])
    assert found.measured(["kl"]) == ([1], [0.0])


def test_rewards_as_they_are_are_not_standardized(run: Run, tmp_path: Path) -> None:
    run.folder.mkdir()
    write(tmp_path / "kind", [json.dumps(line) for line in LINES])
    assert not read(run).standardized
    write(tmp_path / "kind", [json.dumps(line) for line in LINES], {})
    assert not read(run).standardized


@pytest.mark.parametrize("lines", [[], ["{"], ["[1, 2]"], ['{"loss": 1.0}'], ['{"step": 1}']])
def test_what_is_no_log_is_left_out(run: Run, tmp_path: Path, lines: list[str]) -> None:
    run.folder.mkdir()
    write(tmp_path / "kind", lines)
    assert read_trainings([run]) == []


def test_nothing_there_is_nothing_found(run: Run) -> None:
    assert read_trainings([run]) == []
    assert read_trainings([Run(run.folder, {"policies": {"kind": "p"}}, [])]) == []


def test_every_run_has_its_own(run: Run, tmp_path: Path) -> None:
    run.folder.mkdir()
    write(tmp_path / "kind", [json.dumps(line) for line in LINES])
    assert [one.run for one in read_trainings([run, run])] == [0, 1]

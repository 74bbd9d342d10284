"""Methods at equal KL: the lot, hypervolumes by hand, families by the shape of the step, tables, the command."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rewarded_lines.errors import UserError
from rewarded_lines.evaluator.paired_scores import tabulate
from rewarded_lines.evaluator.points import PointSpec
from rewarded_lines.evaluator.records import Point, Run
from rewarded_lines.merger.lines_schedule import Line
from rewarded_lines.merger.methods import MOD
from rewarded_lines.merger.spec import MergeSpec
from rewarded_lines.reports.kl_budgets import drawn_back, families
from rewarded_lines.reports.summary import Summary, summarise
from rewarded_lines.reports.tables import markdown, sheets

HALF = (0.5, 0.5)
SHORT = [  # method, its merge, scores over SFT's, KL
    ("soup", MergeSpec(HALF, 1.0, 0.0), (2.0, 2.0), 4.0),
    ("uniform", MergeSpec(HALF, 1.5, 0.0), (3.0, 3.0), 9.0),
    ("lines", MergeSpec(HALF, 1.0, 1.0), (4.0, 4.0), 8.0),
]


def make_point(spec: PointSpec, gains: tuple[float, float], kl: float) -> Point:
    """Return a point of two prompts, which differ in level only: every resample has the same gains."""
    return Point(
        spec=spec,
        prompts=["one", "two"],
        responses=["a word"] * 2,
        prompt_index=np.arange(2),
        seeds=np.arange(2),
        tokens=np.full(2, 3),
        ended=np.full(2, True),
        kl=np.full(2, kl),
        scores={name: np.array([0.0, 1.0]) + gain for name, gain in zip("ab", gains, strict=True)},
    )


def make(rows: list[tuple[str, MergeSpec, tuple[float, float], float]]) -> Run:
    points = [make_point(PointSpec("sft"), (0.0, 0.0), 0.0)]
    points += [make_point(PointSpec(name, merge), gains, kl) for name, merge, gains, kl in rows]
    header = {
        "rewards": {"a": {"unit": "x"}, "b": {}},
        "policies": {"first": "p", "second": "q"},
        "points": [str(index) for index in range(len(points))],
        "sweep": {"resamples": 100},
    }
    return Run(Path("run"), header, points)


def found(summary: Summary) -> dict[tuple[str, float], float]:
    return {(row.method, one.max_kl): row.hypervolume.value for one in summary.kl_budgets for row in one.hypervolumes}


def test_points_drawn_back_by_hand() -> None:
    # A quarter of the way, as it is, and one whose KL noise has made negative.
    found = drawn_back([[3.0, 18.0], [2.0, 12.0], [1.5, 11.0]], [8.0, 2.0, -0.1], [1.0, 10.0], 2.0)
    assert found.tolist() == [[1.5, 12.0], [2.0, 12.0], [1.5, 11.0]]


def test_the_mean_of_the_lot_is_what_is_said() -> None:
    rng = np.random.default_rng(0)
    prompts, kl = 200_000, 8.0
    policy, start = rng.normal(3.0, 1.0, prompts), rng.normal(1.0, 1.0, prompts)
    answered = rng.random(prompts) < 2.0 / kl
    (found,) = drawn_back([[3.0]], [kl], [1.0], 2.0)
    assert np.where(answered, policy, start).mean() == pytest.approx(found[0], abs=0.01)
    assert np.where(answered, kl, 0.0).mean() == pytest.approx(2.0, abs=0.02)


def test_each_sample_and_run_for_itself() -> None:
    rng = np.random.default_rng(1)
    means, kl, sft = rng.normal(size=(5, 3, 4, 2)), rng.uniform(0, 9, size=(5, 3, 4)), rng.normal(size=(5, 3, 2))
    found = drawn_back(means, kl, sft, 4.0)
    for at in np.ndindex(5, 3):
        assert (found[at] == drawn_back(means[at], kl[at], sft[at], 4.0)).all()


def test_hypervolumes_by_hand() -> None:
    summary = summarise(make(SHORT), max_kl=(10, 3, 4))
    # Within 3 nats soup's (2, 2) becomes 3/4 of it, uniform's (3, 3) a third, LiNeS' (4, 4) three eighths.
    expected = {
        **{("soup, uniform", 3): 1.5**2, ("soup, uniform", 4): 4, ("soup, uniform", 10): 9},
        **{("lines", 3): 1.5**2, ("lines", 4): 4, ("lines", 10): 16},
    }
    assert found(summary) == pytest.approx(expected)
    assert [one.max_kl for one in summary.kl_budgets] == [3, 4, 10]
    (row,) = summary.kl_budgets[2].differences
    assert (row.method, row.other, row.difference.value) == ("lines", "soup, uniform", pytest.approx(7))


def test_a_limit_that_no_point_reaches_changes_nothing() -> None:
    summary = summarise(make(SHORT[::2]), max_kl=(100,))
    above_sft = {row.method: row for row in summary.hypervolumes if row.reference == "sft"}
    assert {row.method: row for row in summary.kl_budgets[0].hypervolumes} == above_sft


def test_runs_are_drawn_back_each_by_its_own_kl() -> None:
    near, far = (make([(*SHORT[0][:3], kl)]) for kl in (4.0, 16.0))
    far = replace(far, folder=Path("far"))
    summary = summarise([near, far], max_kl=(4,))
    assert found(summary) == {("soup", 4): pytest.approx((2**2 + 0.5**2) / 2)}


def test_a_family_without_a_point_within_the_limit_is_marked() -> None:
    rows = [("soup", MergeSpec(HALF, 1.0, 0.0), (2.0, 2.0), 4.0), ("lines", MergeSpec(HALF, 1.0, 1.0), (4.0, 4.0), 8.0)]
    summary = summarise(make(rows), max_kl=(3, 5, 8))
    assert [one.beyond for one in summary.kl_budgets] == [["soup", "lines"], ["lines"], []]
    volumes, differences = (sheet for sheet in sheets(summary) if "equal KL" in sheet.title)
    stars = [[cell.endswith(" *") for cell in row[1:]] for row in (*volumes.rows, *differences.rows)]
    assert stars == [[True, False, False], [True, True, False], [True, True, False]]
    assert "Not a fair comparison" in volumes.note and "Not a fair comparison" in differences.note
    # Half the step is a point within the limit.
    rows.append(("half", MergeSpec(HALF, 0.5, 0.5), (3.0, 3.0), 3.0))
    summary = summarise(make(rows), max_kl=(5,))
    assert summary.kl_budgets[0].beyond == []
    assert all("Not a fair" not in sheet.note for sheet in sheets(summary))


def test_families_share_the_shape_of_the_step() -> None:
    merges = {
        "soup": MergeSpec(HALF, 1.0, 0.0),
        "lines": MergeSpec(HALF, 1.0, 1.0),
        "half": MergeSpec(HALF, 0.5, 0.5),
        "flat": MergeSpec(HALF, lines=(Line(blocks=(2.0, 2.0)),)),
        "reversed": MergeSpec(HALF, 2.0, -1.0),
        "away": MergeSpec(HALF, -1.0, -1.0),
        "shape": MergeSpec(HALF, lines=(Line(blocks=(1.0, 3.0)),)),
        "longer": MergeSpec(HALF, lines=(Line(blocks=(2.0, 6.0)),)),
        "each": MergeSpec(HALF, lines=(Line(1.0, 0.0), Line(2.0, 0.0))),
        "ties": MergeSpec(HALF, 1.0, 0.0, "ties", {"density": 0.2}),
        "ties-long": MergeSpec(HALF, 2.0, 0.0, "ties", {"density": 0.2}),
        "ties-dense": MergeSpec(HALF, 1.0, 0.0, "ties", {"density": 0.5}),
        "mod": MergeSpec(HALF, 1.0, 0.0, MOD),
    }
    run = make([(name, merge, (1.0, 1.0), 1.0) for name, merge in merges.items()])
    # A method of several shapes is on its own; so is a model that is not merged.
    more = [("bent", MergeSpec((place, 1 - place), 1.0, place), (1.0, 1.0), 1.0) for place in (0.2, 0.8)]
    run = replace(run, points=[*run.points, *make(more).points[1:]])
    run.points.append(make_point(PointSpec("morl", checkpoint="one"), (1.0, 1.0), 1.0))
    names = ["soup, flat", "lines, half", "reversed", "away", "shape, longer", "each", "ties, ties-long", "ties-dense"]
    groups = families(tabulate([run]))
    assert list(groups) == [*names, "mod", "bent", "morl"]
    assert sorted(row for rows in groups.values() for row in rows) == list(range(1, len(run.points)))


def test_tables_and_json_have_them_only_if_asked(make_run: Callable[..., Path], cli: Callable[..., Any]) -> None:
    folder = make_run(points=3, prompts=16, resamples=100)
    without = json.loads(cli("report", folder, "--json", "--format", "svg").out)
    assert "kl_budgets" not in without and "equal KL" not in (folder / "report/table.md").read_text()
    answer = cli("report", folder, "--json", "--format", "svg", "--max-kl", "4,2")
    content = json.loads(answer.out)
    assert {**content, "kl_budgets": None} == {**without, "kl_budgets": None}
    assert [one["max_kl"] for one in content["kl_budgets"]] == [2, 4]
    text = (folder / "report/table.md").read_text()
    assert "| methods | KL ≤ 2 | KL ≤ 4 |" in text and "| (lines) − (soup) |" in text


def test_briefly_only_the_first_family_is_compared() -> None:
    rows = [*SHORT, ("reversed", MergeSpec(HALF, 2.0, -1.0), (1.0, 5.0), 7.0)]
    summary = summarise(make([*rows, ("half", MergeSpec(HALF, 0.5, 0.5), (1.0, 1.0), 1.0)]), max_kl=(3,))
    titles = {sheet.title.partition(" [")[0]: len(sheet.rows) for sheet in sheets(summary)}
    assert titles["Difference at equal KL"] == 3
    brief = {sheet.title.partition(" [")[0]: len(sheet.rows) for sheet in sheets(summary, brief=True)}
    assert brief["Difference at equal KL"] == 2
    assert "(reversed) − (lines, half)" in markdown(summary)


@pytest.mark.parametrize("given", ["", "3,", "0", "-1", "nan", "ten", "inf"])
def test_what_is_no_limit_is_refused(given: str, make_run: Callable[..., Path], cli: Callable[..., Any]) -> None:
    folder = make_run(points=3, prompts=8, resamples=100)
    answer = cli("report", folder, f"--max-kl={given}")
    assert answer.code == 1 and "--max-kl" in answer.err and "3,5,10" in answer.err
    assert not (folder / "report").exists()


@pytest.mark.parametrize("given", [(3.0, 0.0), (float("nan"),), (float("inf"),)])
def test_what_is_no_limit_is_refused_in_python_too(given: tuple[float, ...]) -> None:
    with pytest.raises(UserError, match="not a limit of KL"):
        summarise(make(SHORT), max_kl=given)

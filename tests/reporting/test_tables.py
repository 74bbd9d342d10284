"""The tables: what the cells say, and that they fit a terminal."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from rewarded_lines.evaluation.records import load_run
from rewarded_lines.fronts.intervals import Estimate
from rewarded_lines.reporting.summary import Summary, summarise
from rewarded_lines.reporting.tables import interval_text, markdown, points_csv, rich_table, scope_note, sheets

MakeRun = Callable[..., Path]


@pytest.fixture
def summary(make_run: MakeRun) -> Summary:
    return summarise(load_run(make_run(resamples=100)))


def shown(summary: Summary) -> str:
    console = Console(width=80, file=io.StringIO(), record=True)
    for sheet in sheets(summary):
        console.print(rich_table(sheet))
    return console.export_text()


def test_terminal_tables_fit_80_columns_with_units_and_every_row(summary: Summary) -> None:
    text = shown(summary)
    assert max(len(line) for line in text.splitlines()) <= 80
    # rich would take "[logit]" for its markup and drop it.
    assert "[logit]" in text
    assert "[nats]" in text
    assert sum(line.strip().startswith(("sft ", "soup ", "lines ")) for line in text.splitlines()) == 2 * 23 + 4 + 2


def test_hypervolumes_stand_beside_their_references(summary: Summary) -> None:
    sheet = sheets(summary)[1]
    assert sheet.title == "Hypervolume [logit × words]"
    assert [row[:2] for row in sheet.rows] == [
        ("soup", "sft"),
        ("soup", "worst"),
        ("lines", "sft"),
        ("lines", "worst"),
    ]
    positive, detailed = (point.value for point in summary.sft.rewards.values())
    assert sheet.rows[0][2] == f"({positive:.3g}, {detailed:.3g})"


def test_tables_without_rows_are_left_out(make_run: MakeRun) -> None:
    run = load_run(make_run(points=2, resamples=100, methods={"lines": (1.0, 1.0)}))
    titles = [sheet.title for sheet in sheets(summarise(run))]
    assert titles == ["Points", "Hypervolume [logit × words]", "Beside the front"]


def test_markdown_is_made_of_whole_tables(summary: Summary) -> None:
    text = markdown(replace(summary, title="a | b"))
    assert text.startswith("# a \\| b\n")
    for sheet in sheets(summary):
        rows = text.split(f"## {sheet.title}\n\n")[1].split("\n\n")[0].splitlines()
        assert len(rows) == len(sheet.rows) + 2
        assert {row.count("|") for row in rows} == {len(sheet.headings) + 1}


def test_csv_has_unrounded_numbers_for_every_point(summary: Summary) -> None:
    rows = list(csv.DictReader(io.StringIO(points_csv(summary))))
    assert len(rows) == 23
    assert rows[0]["weight.cheerful"] == ""
    last = summary.points[-1]
    assert float(rows[-1]["positive"]) == last.rewards["positive"].value
    assert float(rows[-1]["kl.high"]) == last.kl.high
    assert float(rows[-1]["weight.cheerful"]) == 1.0


@pytest.mark.parametrize(
    ("estimate", "expected"),
    [
        (Estimate(1.2345, 1.1, 1.36), "1.23 [1.10, 1.36]"),
        (Estimate(123.4, 100.0, 150.0), "123 [100, 150]"),
        (Estimate(-0.0004, -0.3, 0.3), "0.00 [-0.30, 0.30]"),
        (Estimate(0.5, 0.5, 0.5), "0.50 [0.50, 0.50]"),
    ],
)
def test_decimals_follow_the_interval(estimate: Estimate, expected: str) -> None:
    assert interval_text(estimate) == expected


def test_notes_say_what_the_numbers_are(summary: Summary) -> None:
    assert "256 prompts, 100 resamples, seed 0" in scope_note(summary)
    assert "not evaluated yet" not in scope_note(summary)
    assert "3 of 26 points are not evaluated yet" in scope_note(replace(summary, missing_points=3))
    assert "λ: weight of cheerful" in sheets(summary)[0].note
    assert "not an unbiased estimate" not in sheets(summary)[0].note
    cold = replace(summary, generation={"temperature": 0.7, "top_p": 0.9})
    assert "temperature 0.7, top_p 0.9, where it is not an unbiased estimate" in sheets(cold)[0].note

"""The tables: what the cells say, and that they fit a terminal."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from rewarded_lines.evaluator.points import PointSpec
from rewarded_lines.evaluator.records import load_run
from rewarded_lines.merger.spec import MergeSpec
from rewarded_lines.pareto.bootstrap import Estimate
from rewarded_lines.reports.sheet import Sheet
from rewarded_lines.reports.summary import PointSummary, Summary, summarise
from rewarded_lines.reports.tables import markdown, points_csv, sheets
from rewarded_lines.reports.texts import interval_text, scope_note

MakeRun = Callable[..., Path]


@pytest.fixture
def summary(make_run: MakeRun) -> Summary:
    return summarise(load_run(make_run(resamples=100)))


def shown(summary: Summary) -> str:
    console = Console(width=80, file=io.StringIO(), record=True)
    for sheet in sheets(summary):
        console.print(sheet)
    return console.export_text()


def test_terminal_tables_fit_80_columns_with_units_and_every_row(summary: Summary) -> None:
    text = shown(summary)
    assert max(len(line) for line in text.splitlines()) <= 80
    # rich would take "[logit]" for its markup and drop it.
    assert "[logit]" in text
    assert "[nats]" in text
    assert sum(line.strip().startswith(("sft ", "soup ", "lines ")) for line in text.splitlines()) == 2 * 23 + 4 + 2


def test_eight_rewards_fit_terminal_and_page(make_run: MakeRun) -> None:
    summary = summarise(load_run(make_run(rewards=8, policies=8, points=38, prompts=32, resamples=100)))
    assert max(len(line) for line in shown(summary).splitlines()) <= 80
    text = markdown(summary)
    assert max(len(line) for line in text.splitlines() if line.startswith("|")) <= 160
    places = [row[1] for row in sheets(summary)[0].rows[:77]]
    # SFT, then both methods in the order of λ.
    assert places[:3] == ["", "1.00 formal", "0.50 safe, 0.50 formal"] and places[1:39] == places[39:]
    assert "0.125 each" in places and "0.50 cheerful, 0.50 detailed" in places
    rounded = next(place for place in places if place.startswith("."))
    assert len(rounded.split()) == 8 and sum(map(float, rounded.split())) == pytest.approx(1, abs=0.04)
    # A volume of eight rewards may be tiny.
    assert interval_text(Estimate(1.234e-9, 1e-10, 2e-9)) == "1.2e-09 [1e-10, 2e-09]"


def test_a_reward_that_never_changes_is_named(summary: Summary) -> None:
    name = next(iter(summary.rewards))
    points = [replace(one, rewards=one.rewards | {name: Estimate(1.0, 1.0, 1.0)}) for one in summary.points]
    assert f"the same {name}, so" in sheets(replace(summary, points=points))[1].note
    assert "the same" not in sheets(summary)[1].note


def test_what_was_approximated_is_said(summary: Summary) -> None:
    assert all("approximated" not in sheet.note for sheet in sheets(summary))
    first, *others = summary.hypervolumes
    rough = replace(summary, hypervolumes=[replace(first, resample_error=0.021), *others], exact_contributions=False)
    volumes, side = sheets(rough)[1], sheets(rough)[-1]
    assert "Above sft, values are exact; their intervals are approximated" in volumes.note and "2.1%" in volumes.note
    assert "It is approximated" in side.note
    worse = replace(rough, hypervolumes=[replace(first, error=0.004, resample_error=0.021)])
    assert "standard error up to 0.4%" in sheets(worse)[1].note


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


def test_csv_tells_a_reward_from_the_column_that_has_its_name(summary: Summary) -> None:
    name = next(iter(summary.rewards))
    points = [
        replace(point, rewards={"kl" if key == name else key: value for key, value in point.rewards.items()})
        for point in summary.points
    ]
    rewards = {"kl" if key == name else key: unit for key, unit in summary.rewards.items()}
    rows = list(csv.DictReader(io.StringIO(points_csv(replace(summary, rewards=rewards, points=points)))))
    last = summary.points[-1]
    assert float(rows[-1]["kl"]) == last.kl.value
    assert float(rows[-1]["reward kl"]) == last.rewards[name].value


@pytest.mark.parametrize(
    ("estimate", "expected"),
    [
        (Estimate(1.2345, 1.1, 1.36), "1.23 [1.10, 1.36]"),
        (Estimate(123.4, 100.0, 150.0), "123 [100, 150]"),
        (Estimate(-0.0004, -0.3, 0.3), "0.00 [-0.30, 0.30]"),
        (Estimate(0.5, 0.5, 0.5), "0.50 [0.50, 0.50]"),
        # Means of 12.3 everywhere, which differ in their last bits.
        (Estimate(12.3, 12.299999999999997, 12.300000000000002), "12.30 [12.30, 12.30]"),
    ],
)
def test_decimals_follow_the_interval(estimate: Estimate, expected: str) -> None:
    assert interval_text(estimate) == expected


def test_tiny_means_are_shown(summary: Summary) -> None:
    """As probabilities of whole answers; of six decimals, all were 0."""
    points = [replace(one, rewards=one.rewards | {"positive": Estimate(3e-9, 1e-9, 5e-9)}) for one in summary.points]
    assert sheets(replace(summary, points=points))[0].rows[0][2] == "3e-09 ±2e-09"


def test_notes_say_what_the_numbers_are(summary: Summary) -> None:
    assert "256 prompts, 100 resamples, seed 0" in scope_note(summary)
    assert "not evaluated yet" not in scope_note(summary)
    assert "3 of 26 points are not evaluated yet" in scope_note(replace(summary, missing_points=3))
    assert "λ: weight of cheerful" in sheets(summary)[0].note
    assert "not an unbiased estimate" not in sheets(summary)[0].note
    cold = replace(summary, generation={"temperature": 0.7, "top_p": 0.9})
    assert "temperature 0.7, top_p 0.9, where it is not an unbiased estimate" in sheets(cold)[0].note
    few = replace(summary, generation={"temperature": 1.0, "top_p": 1.0, "top_k": 50, "max_tokens": 9})
    assert "temperature 1, top_p 1, top_k 50, where it is not an unbiased estimate" in sheets(few)[0].note


@pytest.fixture
def full(summary: Summary) -> Summary:
    """The same with all that a run can have: an audit, perplexities, single policies and baselines."""

    def points() -> Iterator[PointSummary]:
        for point in summary.points:
            yield replace(point, rewards={**point.rewards, "watch": Estimate(0.25, 0.2, 0.3)})
        for method, weights, name in (("policies", (1.0, 0.0), "cheerful"), ("baselines", (), "morl")):
            merge = replace(summary.points[3].merge, weights=weights)
            like = replace(summary.points[3], method=method, weights=weights, merge=merge, checkpoint=name)
            yield replace(like, rewards={**like.rewards, "watch": Estimate(0.5, 0.4, 0.6)})

    return replace(
        summary,
        rewards={**summary.rewards, "watch": "points"},
        audits=["watch"],
        policy_gains=[
            replace(gain, rewards={**gain.rewards, "watch": Estimate(0.0, -0.1, 0.1)}) for gain in summary.policy_gains
        ],
        references={**summary.references, "floor": {"positive": 0.0, "detailed": 1.0}},
        points=[
            replace(
                point,
                perplexities={"control": Estimate(20.0, 19.0, 21.0)},
                forgetting={"control": Estimate(1.0, 0.9, 1.1)},
            )
            for point in points()
        ],
    )


def titled(summary: Summary, title: str) -> Sheet:
    return next(sheet for sheet in sheets(summary) if sheet.title.startswith(title))


def test_models_that_stand_for_themselves_are_named(full: Summary) -> None:
    for title in ("Points", "Beside the front"):
        rows = titled(full, title).rows
        assert [row[:2] for row in rows[-2:]] == [("policies", "cheerful"), ("baselines", "morl")]
        assert rows[0][:2] == ("sft", "")
    assert "| baselines | morl |" in markdown(full)
    assert "morl" in shown(full) and max(map(len, shown(full).splitlines())) <= 80


def test_audits_stand_beside_the_front(full: Summary) -> None:
    assert not any("watch" in heading for heading in titled(full, "Points").headings)
    assert "watch" not in titled(full, "Hypervolume").title
    sheet = titled(full, "Beside the front")
    assert sheet.headings[2:] == ("audit watch [points]", "control perplexity ÷ SFT", "distinct-2", "adds")
    assert sheet.rows[-1][2:4] == ("0.500 ±0.100", "1.00 ±0.10")
    assert (
        "nothing was trained on or chosen by" in sheet.note
        and "SFT's is 20 (control); above 1 is forgotten" in sheet.note
    )
    assert titled(full, "Policies").headings[-1] == "Δ watch [points]"


def test_without_them_they_are_not_spoken_of(summary: Summary) -> None:
    sheet = titled(summary, "Beside the front")
    assert sheet.headings == ("method", "λ", "distinct-2", "adds")
    assert "audit" not in sheet.note and "perplexity" not in sheet.note
    assert "declared" not in titled(summary, "Hypervolume").note


def test_declared_references_are_told(full: Summary) -> None:
    assert "others are as declared" in titled(full, "Hypervolume").note


def test_csv_knows_what_each_point_is(full: Summary) -> None:
    rows = list(csv.DictReader(io.StringIO(points_csv(full))))
    policy, baseline = rows[-2:]
    assert (policy["checkpoint"], policy["weight.cheerful"], policy["weight.detailed"]) == ("cheerful", "1.0", "0.0")
    assert (baseline["checkpoint"], baseline["weight.cheerful"]) == ("morl", "")
    assert {row["checkpoint"] for row in rows[:-2]} == {""}
    assert (baseline["watch"], baseline["control perplexity.low"]) == ("0.5", "19.0")
    assert baseline["control perplexity over SFT.high"] == "1.1"
    assert float(rows[5]["contribution"]) == full.points[5].contribution
    assert float(rows[5]["distinct2"]) == full.points[5].distinct2


def test_csv_has_no_perplexity_where_there_is_none(summary: Summary) -> None:
    rows = list(csv.DictReader(io.StringIO(points_csv(summary))))
    assert not any("perplexity" in name for name in rows[0])


@pytest.mark.parametrize("policies", [2, 3])
def test_the_figure_names_baselines(make_run: MakeRun, policies: int) -> None:
    pytest.importorskip("matplotlib")
    from rewarded_lines.reports.figures.front_figures import front_figure

    run = load_run(make_run(points=3, policies=policies, resamples=100))
    like = run.methods()["soup"][1]
    # Next to each other, and more than the λ that are written of a front.
    baselines = [replace(like, spec=PointSpec("baselines", checkpoint=f"model {index}")) for index in range(2)]
    figure = front_figure(summarise(replace(run, points=[*run.points, *baselines])))
    axes = figure.axes[0]
    assert {"model 0", "model 1"} <= {text.get_text() for text in axes.texts}
    assert any(text.get_text().startswith("baselines: ") for text in figure.legends[0].get_texts())
    (drawn,) = [line for line in axes.lines if str(line.get_label()).startswith("baselines")]
    assert drawn.get_linestyle() == "None" and len(drawn.get_xdata()) == 2


def test_the_figure_of_policies_alone(make_run: MakeRun) -> None:
    pytest.importorskip("matplotlib")
    from rewarded_lines.reports.figures.figure_style import figure_bytes, house_style
    from rewarded_lines.reports.figures.front_figures import front_figure

    run = load_run(make_run(points=2, resamples=100))
    single = replace(run.methods()["soup"][1], spec=PointSpec("policies", MergeSpec((1.0, 0.0), 1.0, 0.0), "cheerful"))
    with house_style():
        figure = front_figure(summarise(replace(run, points=[run.sft, single])))
        assert {text.get_text() for text in figure.axes[0].texts} == {"cheerful", "SFT"}
        assert figure_bytes(figure, "svg")


@pytest.mark.parametrize("width", [50, 60, 72])
def test_wide_letters_cost_no_digit(width: int) -> None:
    """A Chinese letter takes two columns; counted as one, "100.0%" was cut to "1"."""
    rows = [(f"方法{one}号的名字", "0.50", "-1.23 [-2.34, -0.12]", "12.34 ±1.23", "100.0%") for one in "一二"]
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(Sheet("点", ("方法", "λ", "有用性 [分数]", "无害性 [对数几率]", "结束"), rows, labels=2))
    text = console.export_text()
    assert text.count("100.0%") == text.count("-1.23 [-2.34, -0.12]") == 2 and text.count("12.34 ±1.23") == 2
    assert max(map(cell_len, text.splitlines())) <= width


@pytest.mark.parametrize("width", [73, 74, 80])
def test_a_long_heading_costs_no_column(width: int) -> None:
    """Where only folded headings fit, rich would narrow the widest column in vain and drop the last one."""
    rows = [(f"reversed − uniform{one}", "worst", "-1.23 [-2.34, -0.12]", "+143%", "100.0%") for one in "ab"]
    headings = ("methods", "reference", "difference", "relative", "above 0 in")
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(Sheet("Difference", headings, rows, labels=2))
    text = console.export_text()
    assert text.count("100.0%") == 2 and all(word in text for word in ("reference", "relative", "above"))

"""A run by depth: scales of methods, norms of policies."""

from __future__ import annotations

from collections.abc import Callable

import pytest

pytest.importorskip("matplotlib")

from rewarded_lines.merger.inspect import Inspection, Level, Residual, Sum
from rewarded_lines.merger.lines_schedule import Line, Schedule
from rewarded_lines.reports.figures.depth_figure import run_depth_figure, schedules
from rewarded_lines.reports.summary import Summary

MakeSummary = Callable[..., Summary]
METHODS = {"soup": (1.0, 0.0), "lines": (1.0, 1.0), "also": (1.0, 1.0), "reversed": (2.0, -1.0)}


def inspection(stacks: dict[str, int], step: float) -> Inspection:
    levels = [
        Level(1, 10, 40, ("float32",), Residual(2 + step * block, 50.0, 3.0, 10, 9), stack, block, "in", 1.0, ())
        for stack, count in stacks.items()
        for block in range(count)
    ]
    return Inspection("p", "sft", Schedule(), {}, stacks, levels, Sum(1, 1, 1, (), None), [], None, [])


def test_methods_of_one_schedule_share_a_line(make_summary: MakeSummary) -> None:
    summary = make_summary(points=3, methods=METHODS)
    found = {bands[0].lines[0]: names for bands, names in schedules(summary).items() if bands[0] == bands[1]}
    assert found == {Line(1, 0): ["soup"], Line(1, 1): ["lines", "also"], Line(2, -1): ["reversed"]}


def test_scales_and_norms_are_drawn_as_they_are(make_summary: MakeSummary, check_layout: Callable) -> None:
    summary = make_summary(points=3, methods=METHODS)
    figure = run_depth_figure(summary, {"cheerful": inspection({"h": 3}, 0.5), "detailed": inspection({"h": 3}, 1.0)})
    scales, norms = figure.axes
    drawn = {line.get_label(): list(line.get_ydata()) for line in scales.lines}
    assert drawn == {
        "soup: α = 1, β = 0": [1, 1, 1],
        "lines, also: α = 1, β = 1": [1, 1.5, 2],
        "reversed: α = 2, β = −1": [2, 1.5, 1],
    }
    assert {line.get_label(): list(line.get_ydata()) for line in norms.lines} == {
        "residual τ of cheerful": [2, 2.5, 3],
        "residual τ of detailed": [2, 3, 4],
    }
    assert scales.get_ylabel() == "scale s of the residual [×]"
    assert norms.get_ylabel() == "L2 norm [units of the weights]"
    assert {axes.get_xlabel() for axes in figure.axes} == {"block [index from 0]"}
    assert norms.get_ylim()[1] > 4
    check_layout(figure)


def test_every_list_of_blocks_has_its_line(make_summary: MakeSummary) -> None:
    found = {"cheerful": inspection({"encoder": 4, "decoder": 2}, 0.5)}
    scales, norms = run_depth_figure(make_summary(points=3), found).axes
    assert [line.get_label() for line in norms.lines] == [
        "residual τ of cheerful, encoder",
        "residual τ of cheerful, decoder",
    ]
    assert len(scales.lines[0].get_xdata()) == 4

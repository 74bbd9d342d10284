"""Parallel coordinates: how axes are scaled, what colours mean."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from rewarded_lines.reports.figures.figure_style import COLOURS
from rewarded_lines.reports.figures.many_rewards import parallel_figure
from rewarded_lines.reports.summary import Summary

MakeSummary = Callable[..., Summary]


def paths(axes) -> list:
    return [line for line in axes.lines if len(line.get_xdata()) == 4]


def test_axes_run_from_the_lowest_to_the_highest_mean(make_summary: MakeSummary, check_layout: Callable) -> None:
    summary = make_summary(rewards=4, policies=4, points=3)
    figure = parallel_figure(summary)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["Rewarded Soups (β = 0)", "LiNeS (α = β = 1)"]
    heights = np.array([line.get_ydata() for axes in figure.axes for line in paths(axes)])
    assert heights.min(axis=0) == pytest.approx([0] * 4) and heights.max(axis=0) == pytest.approx([1] * 4)
    names = [text.get_text() for text in figure.axes[0].get_xticklabels()]
    assert names == ["positive\n[logit]", "detailed\n[words]", "polite", "readable\n[grade]"]
    assert figure.axes[0].get_ylabel() == "mean, higher is better →"
    check_layout(figure)


def test_colours_are_the_policy_of_the_greatest_weight(make_summary: MakeSummary) -> None:
    summary = make_summary(rewards=4, policies=4, points=3)
    points = summary.methods()["soup"]
    lines = paths(parallel_figure(summary).axes[0])
    for point, line in zip(points, lines, strict=False):
        if line.get_color() != "0.82":
            shared = sorted(point.weights)[-1] == sorted(point.weights)[-2]
            assert line.get_color() == ("0.5" if shared else COLOURS[int(np.argmax(point.weights))])
    assert lines[-1].get_color() == "black" and len(lines) == len(points) + 1


def test_what_its_method_dominates_is_pale(make_summary: MakeSummary) -> None:
    summary = make_summary(rewards=4, policies=4, points=3)
    worst = {name: replace(one, value=one.value - 100) for name, one in summary.sft.rewards.items()}
    index = next(i for i, point in enumerate(summary.points) if point.method == "soup")
    points = [replace(point, rewards=worst) if i == index else point for i, point in enumerate(summary.points)]
    lines = paths(parallel_figure(replace(summary, points=points)).axes[0])
    assert lines[0].get_color() == "0.82" and lines[1].get_color() != "0.82"


def test_many_methods_stay_apart(make_summary: MakeSummary, check_layout: Callable) -> None:
    methods = {f"m{index}": (1.0, index / 8) for index in range(9)}
    figure = parallel_figure(make_summary(rewards=4, policies=4, points=2, methods=methods))
    assert len(figure.axes) == 9
    check_layout(figure)

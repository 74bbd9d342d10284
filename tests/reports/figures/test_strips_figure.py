"""The front of many rewards: what is drawn in each reward's panel, and that it fits."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from rewarded_lines.pareto.choice import knee
from rewarded_lines.reports.figures.front_figures import front_figure
from rewarded_lines.reports.report import figures
from rewarded_lines.reports.summary import Summary

MakeSummary = Callable[..., Summary]
EIGHT = {"rewards": 8, "policies": 8, "points": 12}


def test_each_panel_has_every_point_the_knees_and_the_best_policy(make_summary: MakeSummary) -> None:
    summary = make_summary(**EIGHT)
    figure = front_figure(summary)
    assert len(figure.axes) == 8
    for axes, (reward, unit) in zip(figure.axes, summary.objectives.items(), strict=True):
        assert axes.get_title(loc="left") == (f"{reward} [{unit}]" if unit else reward)
        drawn = {len(line.get_ydata()): line for line in axes.lines if line.get_marker() == "."}
        assert set(drawn) == {12} and sum(line.get_marker() == "." for line in axes.lines) == 2
        markers = [
            line.get_ydata()[0] for line in axes.lines if line.get_marker() in ("s", "o") and len(line.get_ydata()) == 1
        ]
        expected = []
        for points in summary.merged_methods().values():
            means = np.array([[one.value for one in point.rewards.values()] for point in points])
            expected.append(points[knee(means)].rewards[reward].value)
        best = max(summary.policy_points(), key=lambda one: one[0].rewards[reward].value)
        assert markers == [*expected, best[0].rewards[reward].value]
        assert [text.get_text() for text in axes.texts] == [best[1]]


def test_five_rewards_have_no_planes_and_four_have(make_front: Callable) -> None:
    assert len(make_front(rewards=5, policies=5, points=6).axes) == 5
    assert len(make_front(rewards=4, policies=4, points=3).axes) == 6


@pytest.mark.slow
def test_eight_rewards_fit_in_every_figure(make_summary: MakeSummary, check_layout: Callable) -> None:
    methods = {f"m{index}": (1.0, index / 4) for index in range(5)}
    drawn = dict(figures(make_summary(**EIGHT, methods=methods, control=1.0)))
    assert list(drawn) == ["front", "kl", "forgetting", "parallel"]
    for figure in drawn.values():
        check_layout(figure)

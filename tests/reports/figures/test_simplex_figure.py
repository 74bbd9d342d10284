"""The triangle of three policies' weights: where λ lies, what the colours are, what is marked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from rewarded_lines.reports.figures.simplex_figure import simplex_figure, triangle_points
from rewarded_lines.reports.summary import Summary

MakeSummary = Callable[..., Summary]


def test_corners_are_policies_and_the_middle_is_the_mean() -> None:
    at = triangle_points(np.array([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1 / 3, 1 / 3, 1 / 3]]))
    assert at[:3] == pytest.approx(np.array([[0, 0], [1, 0], [0.5, 3**0.5 / 2]]))
    assert at[3] == pytest.approx(at[:3].mean(axis=0))
    sides = [np.linalg.norm(at[i] - at[(i + 1) % 3]) for i in range(3)]
    assert sides == pytest.approx([1, 1, 1])


def test_every_reward_and_method_has_its_triangle(make_summary: MakeSummary, check_layout: Callable) -> None:
    summary = make_summary(rewards=3, policies=3, points=4)
    figure = simplex_figure(summary)
    triangles = [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]
    bars = [axes for axes in figure.axes if axes.get_label() == "<colorbar>"]
    assert len(triangles) == 6 and [bar.get_xlabel() for bar in bars] == [
        "positive [logit]\nhigher is better →",
        "detailed [words]\nhigher is better →",
        "polite\nhigher is better →",
    ]
    assert [axes.get_ylabel() for axes in triangles[::3]] == ["Rewarded Soups\n(β = 0)", "LiNeS\n(α = β = 1)"]
    assert all([text.get_text() for text in axes.texts] == ["cheerful", "detailed", "kind"] for axes in triangles)
    check_layout(figure)


def test_long_names_of_methods_stay_beside_their_row(
    make_summary: MakeSummary, monkeypatch: pytest.MonkeyPatch
) -> None:
    summary = make_summary(rewards=4, policies=3, points=4)
    names = dict.fromkeys(summary.methods(), "uniform (α = 1.52 to 1.55, β = 0)")
    monkeypatch.setattr("rewarded_lines.reports.figures.simplex_figure.method_labels", lambda _: names)
    figure = simplex_figure(summary)
    figure.canvas.draw()
    labels = [axes.yaxis.label for axes in figure.axes if axes.get_ylabel()]
    assert [label.get_text() for label in labels] == ["uniform\n(α = 1.52 to 1.55,\nβ = 0)"] * 2
    first, second = (label.get_window_extent() for label in labels)
    assert not first.overlaps(second)


def test_dots_are_the_weights_and_the_ring_is_the_best(make_summary: MakeSummary) -> None:
    summary = make_summary(rewards=3, policies=3, points=4)
    points = summary.methods()["lines"]
    axes = simplex_figure(summary).axes[4]
    dots, ring = (line.get_xydata() for line in axes.lines[-2:])
    expected = triangle_points(np.array([point.weights for point in points]))
    np.testing.assert_allclose(dots, expected)
    best = max(range(len(points)), key=lambda index: points[index].rewards["detailed"].value)
    np.testing.assert_allclose(ring, expected[[best]])


def test_one_scale_of_colours_for_all_methods(make_summary: MakeSummary) -> None:
    axes = simplex_figure(make_summary(rewards=3, policies=3, points=4)).axes
    fills = [axes[index].collections[0].get_clim() for index in (0, 3)]
    assert fills[0] == fills[1]


@pytest.mark.parametrize("policies", [2, 4])
def test_other_numbers_of_policies_have_no_triangle(make_summary: MakeSummary, policies: int) -> None:
    assert simplex_figure(make_summary(rewards=3, policies=policies, points=3)) is None


def test_weights_on_one_line_have_no_triangle(make_summary: MakeSummary) -> None:
    summary = make_summary(rewards=3, policies=3, points=4)
    edge = [point for point in summary.points if not point.weights or point.weights[2] == 0]
    assert simplex_figure(replace(summary, points=edge)) is None


def test_the_same_mean_everywhere_is_drawn(make_summary: MakeSummary) -> None:
    summary = make_summary(rewards=3, policies=3, points=4)
    same = [replace(point, rewards=summary.sft.rewards) for point in summary.points]
    assert simplex_figure(replace(summary, points=same)) is not None

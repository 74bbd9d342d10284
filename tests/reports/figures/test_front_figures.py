"""The figure: what it says, that nothing overlaps, and that it is the same every time."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import combinations
from typing import Any

import numpy as np
import pytest

from rewarded_lines.reports.figures.figure_style import figure_bytes, house_style
from rewarded_lines.reports.figures.front_figures import front_figure
from rewarded_lines.reports.summary import Summary

pytest.importorskip("matplotlib")
MakeSummary = Callable[..., Summary]
MakeFront = Callable[..., Any]

HARD: dict[str, dict[str, Any]] = {
    "plain": {},
    "fronts on each other": {"methods": {"soup": (1.0, 0.0), "lines": (1.0, 0.02)}},
    "far from SFT": {"gain": 6.0},
    "wide intervals": {"prompts": 24, "spread": 2.0, "gain": 0.5},
    "three methods": {"points": 5, "methods": {"soup": (1.0, 0.0), "lines": (1.0, 1.0), "half": (0.5, 0.5)}},
    "one reward": {"rewards": 1},
    "three rewards": {"rewards": 3, "points": 5},
    "four rewards": {"rewards": 4, "policies": 4, "points": 3},
    "nine methods": {"points": 5, "methods": {f"m{index}": (1.0, index / 8) for index in range(9)}},
}


def texts(svg: bytes) -> list[str]:
    return [re.sub(r"<[^>]+>", "", part) for part in re.findall(r"<text.*?</text>", svg.decode(), re.DOTALL)]


def test_the_svg_holds_its_labels_as_text(make_summary: MakeSummary) -> None:
    written = [text.strip() for text in texts(figure_bytes(front_figure(make_summary()), "svg"))]
    for expected in (
        "positive [logit], higher is better →",
        "detailed [words], higher is better →",
        "Hypervolume above SFT [logit × words] and its 95% interval",
        "λ: weight of cheerful",
        "policy, not merged",
        "cheerful",
        "detailed",
        "SFT",
    ):
        assert expected in written
    assert any(re.fullmatch(r"Rewarded Soups \(β = 0\): \d.*\[.*, .*\]", text) for text in written)
    assert any(re.fullmatch(r"LiNeS \(α = β = 1\): \d.*\[.*, .*\]", text) for text in written)
    assert {"λ = 0", "λ = 0.5", "λ = 1"} <= set(written)


@pytest.mark.parametrize("case", HARD)
def test_labels_overlap_neither_each_other_nor_the_frame(make_front: MakeFront, case: str) -> None:
    figure = make_front(**HARD[case])
    for axes in figure.axes:
        boxes = [text.get_window_extent() for text in axes.texts]
        assert len(boxes) >= 3
        assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))
        assert all(axes.bbox.containsx(x) for box in boxes for x in (box.x0, box.x1))
        assert all(axes.bbox.containsy(y) for box in boxes for y in (box.y0, box.y1))
    legend = figure.legends[0].get_window_extent()
    assert legend.width <= figure.bbox.width
    assert not any(legend.overlaps(axes.bbox) for axes in figure.axes)


def test_labels_keep_off_every_marker(make_front: MakeFront) -> None:
    figure = make_front()
    axes = figure.axes[0]
    marks = np.concatenate(
        [axes.transData.transform(line.get_xydata()) for line in axes.lines if len(line.get_xydata()) > 2]
    )
    for text in axes.texts:
        box = text.get_window_extent()
        assert not box.count_contains(marks)


def test_names_are_never_left_out(make_summary: MakeSummary) -> None:
    figure = front_figure(make_summary(points=41, prompts=24, gain=0.01))
    assert {"cheerful", "detailed", "SFT"} <= {text.get_text() for text in figure.axes[0].texts}


def test_weights_of_three_policies_are_not_joined(make_summary: MakeSummary) -> None:
    axes = front_figure(make_summary(policies=3, rewards=2, points=4)).axes[0]
    assert {text.get_text() for text in axes.texts} == {"cheerful", "detailed", "kind", "SFT"}
    fronts = [line for line in axes.lines if len(line.get_xydata()) == 10]
    assert [line.get_linestyle() for line in fronts] == ["None", "None"]


def test_one_policy_along_depth_only(make_summary: MakeSummary) -> None:
    axes = front_figure(make_summary(policies=1, rewards=2)).axes[0]
    assert {text.get_text() for text in axes.texts} == {"cheerful", "SFT"}


def test_policies_that_are_worse_than_sft_have_no_area(make_summary: MakeSummary) -> None:
    summary = make_summary(gain=-1.0, points=5)
    assert {row.hypervolume.value for row in summary.hypervolumes if row.reference == "sft"} == {0.0}
    labels = [text.get_text() for text in front_figure(summary).legends[0].get_texts()]
    assert labels[0] == "Rewarded Soups (β = 0): 0.00 [0.00, 0.00]"


@pytest.mark.parametrize("kind", ["svg", "png"])
def test_the_same_summary_gives_the_same_bytes_whatever_the_users_own_style_is(
    make_summary: MakeSummary, kind: str
) -> None:
    import matplotlib

    summary = make_summary(points=5)
    first = figure_bytes(front_figure(summary), kind)
    with matplotlib.rc_context({"font.size": 30, "svg.fonttype": "path", "axes.grid": False}), house_style():
        assert first == figure_bytes(front_figure(summary), kind)
    assert len(first) > 5000


@pytest.mark.parametrize(
    ("case", "planes"), [("one reward", 1), ("plain", 1), ("three rewards", 3), ("four rewards", 6)]
)
def test_one_plane_for_each_pair_of_rewards(make_front: MakeFront, case: str, planes: int) -> None:
    figure = make_front(**HARD[case])
    assert len(figure.axes) == planes
    if case == "one reward":
        assert figure.axes[0].get_xlabel() == "KL to SFT [nats], lower is closer"


def test_the_legend_names_the_reference_point(make_summary: MakeSummary, make_front: MakeFront) -> None:
    summary = make_summary()
    first, second = make_front().legends[0].get_title().get_text().split("\n")
    at = ", ".join(f"{value:.3g}" for value in summary.references["sft"].values())
    assert first.startswith("Hypervolume above SFT")
    assert second == f"reference point: ({at})".replace("-", "\N{MINUS SIGN}")


def test_a_matrix_has_names_and_numbers_at_its_outer_axes_only(
    make_summary: MakeSummary, make_front: MakeFront
) -> None:
    summary, figure = make_summary(**HARD["four rewards"]), make_front(**HARD["four rewards"])
    places = [axes.get_subplotspec() for axes in figure.axes]
    planes = {(at.rowspan.start, at.colspan.start): axes for at, axes in zip(places, figure.axes, strict=True)}
    assert sorted(planes) == [(0, 0), (1, 0), (1, 1), (2, 0), (2, 1), (2, 2)]
    for (row, column), axes in planes.items():
        assert bool(axes.get_xlabel()) == (row == 2) and bool(axes.get_ylabel()) == (column == 0)
        assert axes.get_xlim() == planes[2, column].get_xlim() and axes.get_ylim() == planes[row, 0].get_ylim()
    points = summary.methods()["soup"]
    (drawn,) = (line for line in planes[2, 1].lines if line.get_label() == "Rewarded Soups (β = 0)")
    expected = [[point.rewards["detailed"].value, point.rewards["readable"].value] for point in points]
    np.testing.assert_array_equal(drawn.get_xydata(), expected)


@pytest.mark.parametrize("style", ["slides", "grey"])
def test_styles_keep_labels_apart(make_summary: MakeSummary, style: str, check_layout: Callable) -> None:
    with house_style(style):
        check_layout(front_figure(make_summary()))

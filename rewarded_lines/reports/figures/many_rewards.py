"""Figures of many rewards: a strip of points for each reward, and parallel coordinates. Need matplotlib."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from rewarded_lines.pareto.choice import knee
from rewarded_lines.pareto.hypervolume import nondominated
from rewarded_lines.reports.figures.figure_style import (
    WIDE,
    blank_figure,
    columns_of,
    legend_above,
    looks,
    mix,
    settled,
)
from rewarded_lines.reports.figures.label_placement import shorten
from rewarded_lines.reports.figures.plane_figure import FEW, Drawn, axis_label, measure, prepare
from rewarded_lines.reports.summary import PointSummary, Summary
from rewarded_lines.reports.texts import method_labels, with_unit

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Panels side by side at the width of a page, and up to how many rewards they are one fewer.
_COLUMNS, _FEW = 4, 6
_LONGEST = 14
_WIDEST = 20
# Half the width of a strip's points and of its knee's interval.
_SPREAD = 0.22
# At most this many characters of a name below an axis.
_LONGEST_BELOW = 10
# Three panels fit side by side up to _NARROW, and one from _MANY on.
_NARROW, _MANY = 4, 7
_PALE, _SHARED = "0.82", "0.5"


def draw_strips(summary: Summary) -> tuple[Figure, Drawn]:
    """Draw each reward's means by method, and return the figure without its legend.

    A method is a strip of dots, one for each of its points. Its marker is the knee of its front, the point that
    `choose --knee` takes, with its interval. The dashed line and its band are SFT and its interval. A ring is the
    single policy that has most of the reward.
    """
    drawn = prepare(summary, 0.9)
    rows, columns = columns_of(len(summary.objectives), _COLUMNS - (len(summary.objectives) <= _FEW))
    # The legend above has a line for each method, and some more.
    figure = blank_figure(WIDE, 2.0 * rows + 1.0 + 0.15 * len(drawn.methods))
    knees = {name: points[knee(_values(points, summary))] for name, points in drawn.methods.items()}
    for index, reward in enumerate(summary.objectives):
        axes = figure.add_subplot(rows, columns, index + 1)
        _draw_strips(axes, drawn, knees, reward)
        _draw_singles(axes, drawn, reward)
        title, direction = axis_label(reward, summary, lines=2).split("\n")
        # A long name leaves its unit no room beside it.
        axes.set_title(title if len(title) <= _WIDEST else title.replace(" [", "\n["), loc="left", size="medium")
        if index % columns == 0:
            axes.set_ylabel(direction)
    return figure, drawn


def _draw_strips(axes: Axes, drawn: Drawn, knees: dict[str, PointSummary], reward: str) -> None:
    sft = measure(drawn.summary.sft, reward)
    axes.axhspan(sft.low, sft.high, color="0.9", linewidth=0, zorder=0)
    axes.axhline(sft.value, color="black", linestyle="--", linewidth=0.9, marker="", zorder=1)
    for place, (name, points) in enumerate(drawn.methods.items(), start=1):
        look, count = drawn.looks[name], len(points)
        # A fixed step sideways, so that points of equal scores are seen.
        aside = [place + _SPREAD * (2 * ((0.618 * index) % 1) - 1) for index in range(count)]
        heights = [measure(point, reward).value for point in points]
        pale = mix(look.colour, "white", 0.45)
        axes.plot(aside, heights, linestyle="none", marker=".", markersize=3.5, color=pale, zorder=2)
        best = measure(knees[name], reward)
        axes.plot(
            [place, place], [best.low, best.high], color="0.25", linewidth=1.1, linestyle="-", marker="", zorder=4
        )
        axes.plot([place], [best.value], **drawn.line(name) | {"linestyle": "none", "zorder": 5})
    axes.set(xlim=(-0.6, len(drawn.methods) + 0.6), xticks=[])
    axes.grid(True, axis="y")
    axes.margins(y=0.09)


def _draw_singles(axes: Axes, drawn: Drawn, reward: str) -> None:
    """Draw the unmerged policy that has most of a reward, with its interval and name."""
    singles = drawn.summary.policy_points()
    if not singles:
        return
    point, name = max(singles, key=lambda one: measure(one[0], reward).value)
    most = measure(point, reward)
    look: dict[str, Any] = dict(color="0.25", linewidth=1.1, linestyle="-", marker="", zorder=3)
    axes.plot([0, 0], [most.low, most.high], **look)
    axes.plot([0], [most.value], **drawn.mark("policy"))
    axes.annotate(
        shorten(name, _LONGEST), (0, most.high), (0, 3), textcoords="offset points", ha="left", fontsize="x-small"
    ).set_in_layout(False)


def parallel_figure(summary: Summary) -> Figure:
    """Draw every point as a line over the rewards, each axis from its lowest to its highest mean.

    A point that its own method does not dominate has the colour of its heaviest policy, if there is one.
    """
    methods, labels = summary.merged_methods(), method_labels(summary)
    rewards = len(summary.objectives)
    narrow = rewards <= _NARROW and len(methods) > FEW
    rows, columns = columns_of(len(methods), 3 if narrow else 2 if rewards < _MANY else 1)
    figure = blank_figure(WIDE, (2.2 if narrow else 2.7) * rows + 0.6)
    panels = figure.subplots(rows, columns, squeeze=False)
    for axes, (name, points) in zip(panels.flat, methods.items(), strict=False):
        _draw_lines(axes, points, summary)
        axes.set_title(shorten(labels[name], 36), loc="left")
    for axes in panels[:, 0]:
        axes.set_ylabel("mean, higher is better →")
    for axes in panels.flat[len(methods) :]:
        axes.remove()
    _draw_leaders(figure, summary)
    return settled(figure)


def _draw_lines(axes: Axes, points: list[PointSummary], summary: Summary) -> None:
    every, values = _values(summary.points, summary), _values(points, summary)
    low, high = every.min(axis=0), every.max(axis=0)
    high = np.where(high > low, high, low + 1.0)
    colours = [look.colour for look in looks(len(summary.policies) + 1)]
    for point, line, shown in zip(points, (values - low) / (high - low), nondominated(values), strict=True):
        leader = _leader(point)
        own = _SHARED if leader is None else colours[leader]
        colour, order = (own, 3) if shown else (_PALE, 2)
        axes.plot(line, color=colour, linewidth=0.9, marker="", linestyle="-", zorder=order, alpha=0.85)
    sft = (_values([summary.sft], summary)[0] - low) / (high - low)
    axes.plot(sft, color="black", linestyle="--", linewidth=1.2, marker="*", markersize=7, zorder=4)
    _draw_axes(axes, summary, low, high)


def _leader(point: PointSummary) -> int | None:
    """Return the index of a point's heaviest policy, −1 without weights, None if several are heaviest."""
    if not point.weights:
        return -1
    heaviest = [index for index, weight in enumerate(point.weights) if weight == max(point.weights)]
    return heaviest[0] if len(heaviest) == 1 else None


def _draw_axes(axes: Axes, summary: Summary, low: np.ndarray, high: np.ndarray) -> None:
    """Draw a vertical axis for each reward, with the lowest and highest mean at its ends."""
    for place, (least, most) in enumerate(zip(low, high, strict=True)):
        axes.plot([place, place], [0, 1], color="0.4", linewidth=0.7, linestyle="-", marker="", zorder=1)
        for height, value, side in ((-0.04, least, "top"), (1.04, most, "bottom")):
            text = f"{value:.3g}".replace("-", "\N{MINUS SIGN}")
            axes.text(place, height, text, ha="center", va=side, size="small")
    names = [
        "\n[".join(with_unit(shorten(name, _LONGEST_BELOW), shorten(unit, _LONGEST_BELOW)).rsplit(" [", 1))
        for name, unit in summary.objectives.items()
    ]
    axes.set_xticks(range(len(names)), names, size="small")
    axes.tick_params(axis="x", length=0, pad=2)
    axes.set(ylim=(-0.16, 1.16), xlim=(-0.35, len(names) - 0.65), yticks=[])
    axes.spines[["left", "bottom"]].set_visible(False)


def _draw_leaders(figure: Figure, summary: Summary) -> None:
    colours = [look.colour for look in looks(len(summary.policies) + 1)]
    names = [f"most weight on {shorten(name, 16)}" for name in summary.policies]
    leaders = {_leader(point) for points in summary.merged_methods().values() for point in points}
    if -1 in leaders:
        names.append("not merged")
    shared = [("most weight on several", _SHARED)] if None in leaders else []
    kinds = [*zip(names, colours, strict=False), *shared, ("dominated within its method", _PALE)]
    lines = [(text, dict(color=colour, linewidth=1.5, marker="")) for text, colour in kinds]
    sft = dict(color="black", linestyle="--", linewidth=1.2, marker="*")
    legend_above(figure, [*lines, ("SFT", sft)], columns=3)


def _values(points: list[PointSummary], summary: Summary) -> np.ndarray:
    """Return the mean scores of points, [points, rewards]."""
    return np.array([[measure(point, name).value for name in summary.objectives] for point in points])

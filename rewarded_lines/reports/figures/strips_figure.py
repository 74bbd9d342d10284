"""The front of many rewards: a panel per reward with every point of every method. Needs matplotlib."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rewarded_lines.pareto.choice import knee
from rewarded_lines.reports.figures.figure_style import WIDE, blank_figure, columns_of, mix
from rewarded_lines.reports.figures.label_placement import shorten
from rewarded_lines.reports.figures.plane_figure import Drawn, axis_label, measure, prepare
from rewarded_lines.reports.summary import PointSummary, Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Panels side by side at the width of a page, and up to how many rewards they are one fewer.
_COLUMNS, _FEW = 4, 6
_LONGEST = 14
_WIDEST = 20
# Half the width of a strip's points and of its knee's interval.
_SPREAD = 0.22


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
    knees = {name: _knee(points, summary) for name, points in drawn.methods.items()}
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


def _knee(points: list[PointSummary], summary: Summary) -> PointSummary:
    return points[knee([[point.rewards[name].value for name in summary.objectives] for point in points])]


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

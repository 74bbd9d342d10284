"""Figures of planes: the front, and each reward over KL or perplexity. Need matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import wrap
from typing import TYPE_CHECKING, Any

import numpy as np

from rewarded_lines.config import SFT
from rewarded_lines.reports.figures.figure_style import PLANE, WIDE, blank_figure, columns_of, settled
from rewarded_lines.reports.figures.label_placement import shorten
from rewarded_lines.reports.figures.many_rewards import draw_strips
from rewarded_lines.reports.figures.plane_figure import (
    FEW,
    KL,
    PERPLEXITY,
    Drawn,
    Plane,
    axis_label,
    draw_plane,
    freeze,
    measure,
    prepare,
    sft_volumes,
    tint,
)
from rewarded_lines.reports.summary import Summary
from rewarded_lines.reports.texts import interval_text, reference_text, volume_unit

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.legend import Legend

# Scale of markers and lines in a matrix, and the least side of its panels in inches.
_SMALL, _PANEL = 0.75, 2.0
# Least distance between two numbers at an axis, as a share of its length.
_APART = 0.12
# With more rewards there are too many planes for the width of a page.
_MOST_PLANES = 4
# From this ratio of highest to lowest on, perplexities have a logarithmic scale.
_FAR = 3.0
# At most this many characters of a method in the legend, and of a line of its title.
_LONGEST, _WRAPPED = 40, 70


def front_figure(summary: Summary) -> Figure:
    """Draw the fronts: one plane for two rewards, a matrix of planes for three and four, KL for one.

    Five rewards would have ten planes: more get a panel each, see `draw_strips`.
    Points are mean scores, joined in the order of λ for two policies; crosses are intervals of some.
    The shaded area is the hypervolume above SFT in the legend.
    With more than four methods, only the first and the best are shaded and labelled with λ.
    """
    if len(summary.objectives) > _MOST_PLANES:
        figure, drawn = draw_strips(summary)
        _draw_legend(figure, drawn, volumes=True, shaded=False, knees=True)
        return settled(figure)
    return _matrix(summary) if len(summary.objectives) > 2 else _one_plane(summary)


def kl_figure(summary: Summary) -> Figure:
    """Draw the mean of every reward, audits included, over KL to SFT in nats per response."""
    return _over([KL], summary)


def forgetting_figure(summary: Summary) -> Figure:
    """Draw the mean of every reward over the perplexity of each set of control texts."""
    return _over([f"{name}{PERPLEXITY}" for name in summary.controls], summary)


def _one_plane(summary: Summary) -> Figure:
    names = list(summary.objectives)
    plane = (names[0], names[1]) if len(names) == 2 else (KL, names[0])
    drawn = prepare(summary)
    many = len(drawn.methods) > FEW
    # Many methods need a wider legend and plane.
    figure = blank_figure(WIDE, 6.2) if many else blank_figure(PLANE, PLANE)
    axes = figure.add_subplot()
    axes.set(xlabel=axis_label(plane[0], summary), ylabel=axis_label(plane[1], summary))
    draw_plane(axes, drawn, plane, shade=len(names) == 2)
    _draw_legend(figure, drawn, volumes=True, shaded=len(names) == 2)
    return freeze(figure, [(axes, plane)], drawn)


def _matrix(summary: Summary) -> Figure:
    """Draw the plane of each pair of rewards; columns share their x axis, rows their y axis."""
    names = list(summary.objectives)
    side = len(names) - 1
    drawn = prepare(summary, _SMALL)
    width = max(WIDE, _PANEL * side)
    figure = blank_figure(width, width)
    grid = figure.add_gridspec(side, side)
    panels: dict[tuple[int, int], Axes] = {}
    planes: list[tuple[Axes, Plane]] = []
    for row in range(side):
        for column in range(row + 1):
            # The first panel of a column or row has axes of its own, which the others share.
            above = panels.get((column, column)) if row > column else None
            left = panels.get((row, 0)) if column else None
            axes = panels[row, column] = figure.add_subplot(grid[row, column], sharex=above, sharey=left)
            planes.append((axes, (names[column], names[row + 1])))
    for (row, column), (axes, plane) in zip(panels, planes, strict=True):
        draw_plane(axes, drawn, plane)
        # Only the outer axes have labels and numbers.
        axes.tick_params(labelbottom=row == side - 1, labelleft=column == 0)
        if row == side - 1:
            axes.set_xlabel(axis_label(plane[0], summary, lines=2))
        if column == 0:
            axes.set_ylabel(axis_label(plane[1], summary, lines=2))
    _draw_legend(figure, drawn, volumes=True, shaded=False, corner=True)
    return freeze(figure, planes, drawn)


def _over(costs: Sequence[str], summary: Summary) -> Figure:
    rewards = list(summary.rewards)
    rows, columns = columns_of(len(rewards), 2 if len(rewards) == 4 else 3)
    drawn = prepare(summary, scale=1.0 if columns == 1 else 0.8)
    width = PLANE if columns == 1 else WIDE
    # From three rows on, a long label of the first row would meet the legend.
    share = 0.9 if rows < 3 else 1.0
    figure = blank_figure(width, len(costs) * rows * (share * width / columns) + 1.0)
    planes: list[tuple[Axes, Plane]] = []
    for place, cost in enumerate(costs):
        for index, reward in enumerate(rewards):
            axes = figure.add_subplot(len(costs) * rows, columns, place * rows * columns + index + 1)
            draw_plane(axes, drawn, (cost, reward))
            below = _below(cost, summary, _stretch(axes, summary, cost), columns)
            axes.set(xlabel=below, ylabel=axis_label(reward, summary, lines=min(columns, 2)))
            planes.append((axes, (cost, reward)))
    _draw_legend(figure, drawn, volumes=False, shaded=False)
    return freeze(figure, planes, drawn)


def _below(cost: str, summary: Summary, scale: str, columns: int) -> str:
    """Return the label of the costs' axis, with the lines that panels of this width need."""
    name, *rest = axis_label(cost, summary, lines=2).split("\n")
    rest += [scale] if scale else []
    if columns <= 2:
        return f"{name}\n{', '.join(rest)}"
    # In three columns the unit of a perplexity needs its own line.
    return "\n".join([name if cost == KL else name.replace(" [", "\n["), *rest])


def _stretch(axes: Axes, summary: Summary, cost: str) -> str:
    """Set a scale of the costs' axis that keeps points near SFT apart, and return its name.

    For KL this is the square root, as in Gao et al., "Scaling Laws for Reward Model
    Overoptimization", 2023. An estimate of KL may be negative.
    """
    if cost == KL:
        signed_root = (lambda kl: np.sign(kl) * np.sqrt(np.abs(kl)), lambda root: np.sign(root) * root**2)
        axes.set_xscale("function", functions=signed_root)
        _number(axes, [0.0, *_decades(1, 2, 5)])
        return "square-root scale"
    values = [measure(point, cost).value for point in summary.points]
    if max(values) / min(values) < _FAR:
        return ""
    axes.set_xscale("log")
    _number(axes, _decades(1, 1.5, 2, 3, 5, 7))
    return "log scale"


def _decades(*steps: float) -> list[float]:
    """Return the steps times 10⁶ to 10⁻², the largest first."""
    return [step * 10.0**power for power in range(6, -3, -1) for step in reversed(steps)]


def _number(axes: Axes, candidates: Sequence[float]) -> None:
    """Number the x axis with the candidates that fit, the first candidates first."""
    low, high = axes.get_xlim()
    kept: dict[float, float] = {}
    for value in candidates:
        if low <= value <= high:
            place = axes.transAxes.inverted().transform(axes.transData.transform((value, 0.0)))[0]
            if all(abs(place - other) >= _APART for other in kept.values()):
                kept[value] = place
    axes.set_xticks(list(kept), [f"{value:g}" for value in kept])
    axes.set_xticks([], minor=True)


def _draw_legend(
    figure: Figure, drawn: Drawn, volumes: bool, shaded: bool, corner: bool = False, knees: bool = False
) -> None:
    """Add the legend above the panels, or with `corner` in the upper right corner if it fits there.

    `volumes` adds each method's hypervolume, and the reference point in the title. `knees` is for `draw_strips`.
    """
    from matplotlib.legend_handler import HandlerTuple

    handles, labels = _entries(drawn, volumes, shaded, knees)
    beside = {tuple: HandlerTuple(pad=0)}

    def draw(where: str, lines: int, columns: int) -> Legend:
        title = _title(drawn.summary, lines) if volumes else None
        look: dict[str, Any] = dict(loc=where, ncols=columns, frameon=False, alignment="left", columnspacing=1.5)
        return figure.legend(handles, labels, title=title, handler_map=beside, **look)

    if corner:
        legend = draw("upper right", 3, 1)
        figure.draw_without_rendering()
        if not _collides(figure, legend):
            return
        legend.remove()
    for columns in (3, 2, 1):
        legend = draw("outside upper left", 2, columns)
        if columns == 1 or legend.get_window_extent().width <= figure.bbox.width:
            return
        legend.remove()


def _title(summary: Summary, lines: int) -> str:
    """Return the legend's title on at least 2 or 3 lines: hypervolume, unit, reference point."""
    at = reference_text(summary, SFT).replace("-", "\N{MINUS SIGN}")
    what = f"Hypervolume above SFT{' ' if lines == 2 else chr(10)}[{volume_unit(summary)}]"
    # Rewards without a unit contribute their names, which may be long.
    whole = f"{what} and its {summary.level:.0%} interval\nreference point: {at}"
    return "\n".join(part for line in whole.splitlines() for part in wrap(line, _WRAPPED))


def _entries(drawn: Drawn, volumes: bool, shaded: bool, knees: bool = False) -> tuple[list[Any], list[str]]:
    """Return the legend's handles and labels: methods, policies, intervals, and λ."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    summary = drawn.summary
    found: list[tuple[Any, str]] = []
    numbers = sft_volumes(summary) if volumes else {}
    for name in drawn.methods:
        line = Line2D([], [], **drawn.line(name))
        tinted = shaded and name in drawn.chosen
        number = f": {interval_text(numbers[name])}".replace("-", "\N{MINUS SIGN}") if name in numbers else ""
        handle = (Patch(facecolor=tint(drawn.looks[name]), linewidth=0), line) if tinted else line
        found.append((handle, shorten(drawn.labels[name], _LONGEST) + number))
    if summary.policy_points():
        most = "policy with most of it, not merged" if knees else "policy, not merged"
        found.append((Line2D([], [], **drawn.mark("policy")), most))
    if knees:
        found.append((Line2D([], [], color="black", linestyle="--", linewidth=0.9, marker=""), "SFT"))
        found.append((Line2D([], [], linestyle="none"), "dots: each λ; markers: the knee of each front"))
    found.append((Line2D([], [], **drawn.mark("interval")), f"{summary.level:.0%} interval of a mean"))
    if len(summary.policies) == 2 and (merged := [point for point in summary.points if point.lam is not None]):
        sign, (first, *_) = ("μ", merged[0].preference) if merged[0].preference else ("λ", summary.policies)
        found.append((Line2D([], [], linestyle="none"), f"{sign}: weight of {shorten(first, _LONGEST)}"))
    return [handle for handle, _ in found], [label for _, label in found]


def _collides(figure: Figure, legend: Legend) -> bool:
    """True if a legend leaves the figure or covers part of a panel."""
    box = legend.get_window_extent()
    panels = [axes.get_tightbbox() for axes in figure.axes]
    return box.x0 < 0 or box.y0 < 0 or any(panel is not None and box.overlaps(panel) for panel in panels)

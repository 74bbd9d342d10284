"""Four rewards or more: parallel coordinates, a panel for each method. Needs matplotlib."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from rewarded_lines.drawing.labels import shorten
from rewarded_lines.drawing.planes import FEW, columns_of, measure
from rewarded_lines.drawing.style import PAPER, WIDE, blank_figure, house_style, looks
from rewarded_lines.fronts.pareto import nondominated
from rewarded_lines.summaries.names import merged_methods, method_labels
from rewarded_lines.summaries.summary import PointSummary, Summary
from rewarded_lines.summaries.tables import with_unit

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_FEWEST = 4
# Characters of a name below an axis.
_LONGEST = 10
# From so many on, the axes of a panel need the whole width.
_MANY = 7


def parallel_figure(summary: Summary, style: str = PAPER) -> Figure | None:
    """Draw every point as a line over the rewards, each axis from the lowest mean of any point to the highest.

    Coloured, by the policy of the greatest weight: points that no other point of their method beats on all rewards.

    Args:
        summary: the numbers.
        style: see `house_style`.

    Returns:
        The figure, or None where fewer than four rewards make the front.

    Raises:
        UserError: matplotlib is not installed, or there is no such style.
    """
    if len(summary.objectives) < _FEWEST:
        return None
    methods, labels = merged_methods(summary), method_labels(summary)
    narrow = len(summary.objectives) == _FEWEST and len(methods) > FEW
    rows, columns = columns_of(len(methods), 3 if narrow else 2 if len(summary.objectives) < _MANY else 1)
    with house_style(style):
        figure = blank_figure(WIDE, (2.2 if narrow else 2.7) * rows + 0.6)
        panels = figure.subplots(rows, columns, squeeze=False)
        for axes, (name, points) in zip(panels.flat, methods.items(), strict=False):
            _draw_method(axes, points, summary)
            axes.set_title(shorten(labels[name], 36), loc="left")
        for axes in panels[:, 0]:
            axes.set_ylabel("mean, higher is better →")
        for axes in panels.flat[len(methods) :]:
            axes.remove()
        _draw_legend(figure, summary)
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
    return figure


def _draw_method(axes: Axes, points: list[PointSummary], summary: Summary) -> None:
    values, best = _values(points, summary), np.zeros(len(points), dtype=bool)
    best[nondominated(values)] = True
    low, high = _ends(summary)
    places = np.arange(len(low))
    colours = [look.colour for look in looks(len(summary.policies) + 1)]
    for point, line, shown in zip(points, (values - low) / (high - low), best, strict=True):
        leader = int(np.argmax(point.weights)) if point.weights else len(summary.policies)
        colour, order = (colours[leader], 3) if shown else ("0.82", 2)
        axes.plot(places, line, color=colour, linewidth=0.9, marker="", linestyle="-", zorder=order, alpha=0.85)
    sft = (_values([summary.sft], summary)[0] - low) / (high - low)
    axes.plot(places, sft, color="black", linestyle="--", linewidth=1.2, marker="*", markersize=7, zorder=4)
    _draw_axes(axes, summary, low, high)


def _draw_axes(axes: Axes, summary: Summary, low: np.ndarray, high: np.ndarray) -> None:
    """Draw an upright axis for each reward, its lowest and its highest mean at its ends."""
    for place, (least, most) in enumerate(zip(low, high, strict=True)):
        axes.plot([place, place], [0, 1], color="0.4", linewidth=0.7, linestyle="-", marker="", zorder=1)
        for height, value, side in ((-0.04, least, "top"), (1.04, most, "bottom")):
            text = f"{value:.3g}".replace("-", "\N{MINUS SIGN}")
            axes.text(place, height, text, ha="center", va=side, size="small")
    names = [
        "\n[".join(with_unit(shorten(name, _LONGEST), shorten(unit, _LONGEST)).rsplit(" [", 1))
        for name, unit in summary.objectives.items()
    ]
    axes.set_xticks(range(len(names)), names, size="small")
    axes.tick_params(axis="x", length=0, pad=2)
    axes.set(ylim=(-0.16, 1.16), xlim=(-0.35, len(names) - 0.65), yticks=[])
    axes.spines[["left", "bottom"]].set_visible(False)


def _draw_legend(figure: Figure, summary: Summary) -> None:
    from matplotlib.lines import Line2D

    colours = [look.colour for look in looks(len(summary.policies) + 1)]
    names = [f"most weight on {shorten(name, 16)}" for name in summary.policies]
    kinds = list(zip(names, colours, strict=False))
    if any(not point.weights for points in merged_methods(summary).values() for point in points):
        kinds.append(("not merged", colours[-1]))
    handles = [Line2D([], [], color=colour, linewidth=1.5, marker="", label=text) for text, colour in kinds]
    handles.append(Line2D([], [], color="0.82", linewidth=1.5, marker="", label="dominated within its method"))
    handles.append(Line2D([], [], color="black", linestyle="--", linewidth=1.2, marker="*", label="SFT"))
    figure.legend(handles=handles, loc="outside upper left", ncols=3, frameon=False, columnspacing=1.5)


def _ends(summary: Summary) -> tuple[np.ndarray, np.ndarray]:
    """Return the lowest and the highest mean of each reward over all points; never the same."""
    values = _values(summary.points, summary)
    low, high = values.min(axis=0), values.max(axis=0)
    return low, np.where(high > low, high, low + 1.0)


def _values(points: list[PointSummary], summary: Summary) -> np.ndarray:
    """Return the mean scores of points, [points, rewards]."""
    return np.array([[measure(point, name).value for name in summary.objectives] for point in points])

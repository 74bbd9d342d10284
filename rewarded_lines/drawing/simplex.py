"""Three policies: the triangle of their weights, coloured by each reward, a row for each method. Needs matplotlib."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from rewarded_lines.drawing.labels import shorten
from rewarded_lines.drawing.planes import axis_label, measure
from rewarded_lines.drawing.style import PAPER, WIDE, blank_figure, house_style
from rewarded_lines.summaries.names import merged_methods, method_labels
from rewarded_lines.summaries.summary import PointSummary, Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Where the weight of one policy is 1, counted against the clock from below left.
_CORNERS = np.array([[0.0, 0.0], [1.0, 0.0], [0.5, np.sqrt(3) / 2]])
_GRID: dict[str, Any] = dict(color="white", linewidth=0.5, alpha=0.6, marker="", linestyle="-", zorder=2)
_LEVELS = 9
_TICKS = 5
# Of a method's label, in letters.
_LONGEST_LINE = 20
# The largest smallest-to-largest ratio of a triangle that is no sliver along an edge of the grid.
_FLAT = 0.02


def simplex_figure(summary: Summary, style: str = PAPER) -> Figure | None:
    """Draw the mean of every reward over the weights of three policies.

    Between the evaluated λ, which are dots, means are interpolated linearly on a triangulation. Colours of a reward
    mean the same for all methods. Rings: the best λ. Dashed: where the mean is that of the SFT model.

    Args:
        summary: the numbers.
        style: see `house_style`.

    Returns:
        The figure, or None where not three policies were merged, at three λ or more that span the triangle.

    Raises:
        UserError: matplotlib is not installed, or there is no such style.
    """
    methods = {name: points for name, points in merged_methods(summary).items() if _spans(points)}
    if len(summary.policies) != 3 or not methods:
        return None
    rewards = list(summary.rewards)
    with house_style(style):
        side = WIDE / max(len(rewards), 2)
        figure = blank_figure(side * len(rewards), 0.86 * side * len(methods) + 0.9)
        panels = figure.subplots(len(methods), len(rewards), squeeze=False)
        labels = method_labels(summary)
        for column, reward in enumerate(rewards):
            limits = _limits(methods, reward)
            for row, (name, points) in enumerate(methods.items()):
                axes = panels[row, column]
                mapped = _draw_triangle(axes, points, reward, limits, summary.sft)
                _write_corners(axes, [shorten(name, 12 if len(rewards) > 2 else 18) for name in summary.policies])
                if column == 0:
                    axes.set_ylabel(_lines(shorten(labels[name], 36)))
            bar = figure.colorbar(mapped, ax=panels[:, column], location="bottom", aspect=25, pad=0.02)
            bar.set_label(axis_label(reward, summary, lines=2))
            ticks = bar.get_ticks().tolist()
            bar.set_ticks(ticks[:: -(-len(ticks) // _TICKS)])
        _draw_legend(figure)
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
    return figure


def triangle_points(weights: np.ndarray) -> np.ndarray:
    """Return where weights lie in the triangle, Σ λᵢ·cornerᵢ: [points, 3] → [points, 2]."""
    return weights @ _CORNERS


def _spans(points: list[PointSummary]) -> bool:
    weights = np.array([point.weights for point in points if len(point.weights) == 3])
    return len(weights) >= 3 and np.linalg.matrix_rank(weights - weights[0], tol=1e-9) == 2


def _limits(methods: dict[str, list[PointSummary]], reward: str) -> tuple[float, float]:
    values = [measure(point, reward).value for points in methods.values() for point in points if point.weights]
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _lines(label: str) -> str:
    """Return a method's name above its schedule, which is broken where it is longer than a triangle is high."""
    name, separator, schedule = label.partition(" (")
    if len(schedule) > _LONGEST_LINE:
        schedule = schedule.replace(", ", ",\n")
    return f"{name}\n({schedule}" if separator else label


def _draw_triangle(
    axes: Axes, points: list[PointSummary], reward: str, limits: tuple[float, float], sft: PointSummary
) -> Any:
    from matplotlib import rcParams
    from matplotlib.ticker import MaxNLocator
    from matplotlib.tri import TriAnalyzer, Triangulation

    points = [point for point in points if len(point.weights) == 3]
    at = triangle_points(np.array([point.weights for point in points]))
    values = np.array([measure(point, reward).value for point in points])
    triangles = Triangulation(*at.T)
    triangles.set_mask(TriAnalyzer(triangles).get_flat_tri_mask(_FLAT))
    levels = MaxNLocator(_LEVELS).tick_values(*limits)
    mapped = axes.tricontourf(triangles, values, levels=levels, zorder=1)
    _draw_grid(axes)
    level = measure(sft, reward).value
    if values.min() < level < values.max():
        axes.tricontour(triangles, values, levels=[level], colors="black", linestyles="--", linewidths=1.0, zorder=3)
    size = rcParams["lines.markersize"]
    axes.plot(*at.T, **_dot(size))
    axes.plot(*at[[values.argmax()]].T, **_ring(size))
    return mapped


def _dot(size: float) -> dict[str, Any]:
    return dict(
        linestyle="none", marker="o", markersize=0.45 * size, color="black", markeredgecolor="white",
        markeredgewidth=0.4, zorder=4, clip_on=False,
    )  # fmt: skip


def _ring(size: float) -> dict[str, Any]:
    return dict(
        linestyle="none", marker="o", markersize=1.6 * size, color="black", markerfacecolor="none",
        markeredgewidth=1.0, zorder=5, clip_on=False,
    )  # fmt: skip


def _draw_grid(axes: Axes) -> None:
    """Draw the triangle, and lines where a weight is a quarter, a half and three quarters."""
    outline = np.concatenate([_CORNERS, _CORNERS[:1]])
    axes.plot(*outline.T, color="black", linewidth=0.7, marker="", linestyle="-", zorder=3)
    for share in (0.25, 0.5, 0.75):
        for index in range(3):
            there, left, right = (_CORNERS[(index + step) % 3] for step in range(3))
            ends = np.array([share * there + (1 - share) * other for other in (left, right)])
            axes.plot(*ends.T, **_GRID)
    axes.set_aspect("equal")
    axes.set(xlim=(-0.12, 1.12), ylim=(-0.16, 1.02), xticks=[], yticks=[])
    axes.set_frame_on(False)


def _write_corners(axes: Axes, policies: list[str]) -> None:
    """Write each policy's name at the corner where its weight is 1."""
    left, right, top = policies
    axes.text(-0.08, -0.05, left, ha="left", va="top", size="medium")
    axes.text(1.08, -0.05, right, ha="right", va="top", size="medium")
    axes.text(0.5, _CORNERS[2, 1] + 0.05, top, ha="center", va="bottom", size="medium")


def _draw_legend(figure: Figure) -> None:
    from matplotlib import rcParams
    from matplotlib.lines import Line2D

    size = rcParams["lines.markersize"]
    handles = [
        Line2D([], [], label="λ, evaluated; a corner is one policy alone", **_dot(size)),
        Line2D([], [], label="highest mean", **_ring(size)),
        Line2D([], [], label="mean of the SFT model", color="black", linestyle="--", linewidth=1.0, marker=""),
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=3, frameon=False, columnspacing=1.5)

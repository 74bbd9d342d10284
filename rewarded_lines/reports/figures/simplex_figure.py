"""Triangles of three policies' weights, coloured by reward, a row per method. Needs matplotlib."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from rewarded_lines.reports.figures.figure_style import WIDE, blank_figure, legend_above, settled
from rewarded_lines.reports.figures.label_placement import shorten
from rewarded_lines.reports.figures.plane_figure import axis_label, measure
from rewarded_lines.reports.summary import PointSummary, Summary
from rewarded_lines.reports.texts import method_labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The corners: left, right, top.
_CORNERS = np.array([[0.0, 0.0], [1.0, 0.0], [0.5, np.sqrt(3) / 2]])
_GRID: dict[str, Any] = dict(color="white", linewidth=0.5, alpha=0.6, marker="", linestyle="-", zorder=2)
# At most this many colours and numbers of the bar, and characters of a line of a label.
_LEVELS, _TICKS, _LONGEST_LINE = 9, 5, 20
# Slivers with a smaller ratio of inner to outer circle are left out of the triangulation.
_FLAT = 0.02


def simplex_figure(summary: Summary) -> Figure | None:
    """Draw the mean of every reward over the weights of three policies.

    Dots are the evaluated λ; means between them are interpolated linearly on a triangulation.
    All methods share the colours of a reward. A ring marks the best λ, a dashed line SFT's mean.
    None if no method has λ that span a triangle.
    """
    methods = {name: points for name, points in summary.merged_methods().items() if _spans(points)}
    if not methods:
        return None
    rewards, labels = list(summary.rewards), method_labels(summary)
    side = WIDE / max(len(rewards), 2)
    figure = blank_figure(side * len(rewards), 0.86 * side * len(methods) + 0.9)
    panels = figure.subplots(len(methods), len(rewards), squeeze=False)
    sign, one, names = "λ", "policy", summary.policies
    if asked := next(iter(methods.values()))[0].preference:
        sign, one, names = "μ", "reward", list(asked)
    corners = [shorten(name, 12 if len(rewards) > 2 else 18) for name in names]
    for column, reward in enumerate(rewards):
        limits = _limits(methods, reward)
        for axes, points in zip(panels[:, column], methods.values(), strict=True):
            mapped = _draw_triangle(axes, points, reward, limits, summary.sft)
            _write_corners(axes, corners)
        bar = figure.colorbar(mapped, ax=panels[:, column], location="bottom", aspect=25, pad=0.02)
        bar.set_label(axis_label(reward, summary, lines=2))
        ticks = bar.get_ticks().tolist()
        bar.set_ticks(ticks[:: -(-len(ticks) // _TICKS)])
    for axes, name in zip(panels[:, 0], methods, strict=True):
        axes.set_ylabel(_lines(shorten(labels[name], 36)))
    dashed = dict(color="black", linestyle="--", linewidth=1.0, marker="")
    dot, ring = _marks()
    evaluated = (f"{sign}, evaluated; a corner is one {one} alone", dot)
    kinds = [evaluated, ("highest mean", ring), ("mean of the SFT model", dashed)]
    legend_above(figure, kinds, columns=3)
    return settled(figure)


def triangle_points(weights: np.ndarray) -> np.ndarray:
    """Return the places of weights in the triangle, Σ λᵢ·cornerᵢ: [points, 3] → [points, 2]."""
    return weights @ _CORNERS


def _spans(points: list[PointSummary]) -> bool:
    """True if the weights of three policies do not lie on one line."""
    weights = np.array([point.place for point in points if len(point.place) == 3])
    return len(weights) >= 3 and np.linalg.matrix_rank(weights - weights[0], tol=1e-9) == 2


def _limits(methods: dict[str, list[PointSummary]], reward: str) -> tuple[float, float]:
    values = [measure(point, reward).value for points in methods.values() for point in points if point.place]
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _lines(label: str) -> str:
    """Return a method's name above its schedule; a long schedule has two lines."""
    name, separator, schedule = label.partition(" (")
    if len(schedule) > _LONGEST_LINE:
        schedule = schedule.replace(", ", ",\n")
    return f"{name}\n({schedule}" if separator else label


def _draw_triangle(
    axes: Axes, points: list[PointSummary], reward: str, limits: tuple[float, float], sft: PointSummary
) -> Any:
    from matplotlib.ticker import MaxNLocator
    from matplotlib.tri import TriAnalyzer, Triangulation

    points = [point for point in points if len(point.place) == 3]
    at = triangle_points(np.array([point.place for point in points]))
    values = np.array([measure(point, reward).value for point in points])
    triangles = Triangulation(*at.T)
    triangles.set_mask(TriAnalyzer(triangles).get_flat_tri_mask(_FLAT))
    levels = MaxNLocator(_LEVELS).tick_values(*limits)
    mapped = axes.tricontourf(triangles, values, levels=levels, zorder=1)
    _draw_grid(axes)
    level = measure(sft, reward).value
    if values.min() < level < values.max():
        axes.tricontour(triangles, values, levels=[level], colors="black", linestyles="--", linewidths=1.0, zorder=3)
    dot, ring = _marks()
    axes.plot(*at.T, **dot, zorder=4, clip_on=False)
    axes.plot(*at[[values.argmax()]].T, **ring, zorder=5, clip_on=False)
    return mapped


def _marks() -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the keywords of a dot and of a ring."""
    from matplotlib import rcParams

    size = rcParams["lines.markersize"]
    both = dict(linestyle="none", marker="o", color="black")
    dot = dict(markersize=0.45 * size, markeredgecolor="white", markeredgewidth=0.4)
    ring = dict(markersize=1.6 * size, markerfacecolor="none", markeredgewidth=1.0)
    return both | dot, both | ring


def _draw_grid(axes: Axes) -> None:
    """Draw the triangle, and lines at weights of a quarter, a half and three quarters."""
    outline = np.concatenate([_CORNERS, _CORNERS[:1]])
    axes.plot(*outline.T, color="black", linewidth=0.7, marker="", linestyle="-", zorder=3)
    for share in (0.25, 0.5, 0.75):
        for corner in range(3):
            ends = share * _CORNERS[corner] + (1 - share) * np.delete(_CORNERS, corner, axis=0)
            axes.plot(*ends.T, **_GRID)
    axes.set_aspect("equal")
    axes.set(xlim=(-0.12, 1.12), ylim=(-0.16, 1.02), xticks=[], yticks=[])
    axes.set_frame_on(False)


def _write_corners(axes: Axes, policies: list[str]) -> None:
    left, right, top = policies
    axes.text(-0.08, -0.05, left, ha="left", va="top", size="medium")
    axes.text(1.08, -0.05, right, ha="right", va="top", size="medium")
    axes.text(0.5, _CORNERS[2, 1] + 0.05, top, ha="center", va="bottom", size="medium")

"""The figure of a front: every method's points along λ, in the planes of the rewards. Needs matplotlib."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import combinations, cycle
from typing import TYPE_CHECKING, Any

import numpy as np

from rewarded_lines.config import POLICIES
from rewarded_lines.errors import fail
from rewarded_lines.fronts.intervals import Estimate
from rewarded_lines.fronts.pareto import nondominated
from rewarded_lines.drawing.labels import Label, boxes_along, boxes_around, write_labels
from rewarded_lines.summaries.summary import PointSummary, Summary, is_policy
from rewarded_lines.summaries.tables import interval_text, volume_unit, with_unit

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito, "Color Universal Design", 2008; neighbours also differ in lightness and in their marker.
COLOURS = ("#E69F00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
MARKERS = ("s", "o", "^", "v", "P", "X")
DPI = 200
# Pixels in a typographic point.
_UNIT = DPI / 72
_STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Arial", "Helvetica"],
    "font.size": 9,
    "axes.labelsize": 9,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "svg.fonttype": "none",
    "pdf.fonttype": 42,
    "svg.hashsalt": "rewarded-lines",
}
KL = "KL to SFT"
_FRONT: dict[str, Any] = dict(linewidth=1.5, markersize=5.5, markeredgecolor="white", markeredgewidth=0.5, zorder=4)
_MARK: dict[str, Any] = dict(color="black", linestyle="none", zorder=6)
_SFT_STAR = _MARK | dict(marker="*", markersize=11)
_POLICY_RING = _MARK | dict(marker="o", markersize=10, markerfacecolor="none", markeredgewidth=0.9)
_CROSS = _MARK | dict(marker="+", markersize=10, color="0.4", markeredgewidth=0.8)


def front_figure(summary: Summary) -> Figure:
    """Draw the fronts of a run.

    Two rewards make one plane, more make one plane for each pair; a single reward is drawn over KL to SFT.
    Points are mean scores, joined in the order of λ when two policies were merged; crosses are the intervals
    of some of them. Shaded: what a method's nondominated points dominate above the SFT model, whose area is
    the hypervolume in the legend.

    Raises:
        UserError: matplotlib is not installed.
    """
    with house_style():
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        planes = list(combinations(summary.objectives, 2)) or [(KL, next(iter(summary.objectives)))]
        columns = min(len(planes), 3)
        rows = -(-len(planes) // columns)
        figure = Figure(figsize=(4.6 * columns, 3.7 * rows + 0.9), dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)
        for index, plane in enumerate(planes):
            axes = figure.add_subplot(rows, columns, index + 1)
            _draw_plane(axes, summary, plane)
        _draw_legend(figure, summary)
        figure.draw_without_rendering()
        for axes, plane in zip(figure.axes, planes, strict=True):
            write_labels(axes, _labels(axes, summary, plane), *_obstacles(axes, summary, plane))
        # Labels were placed in pixels, so nothing may move from here on.
        figure.set_layout_engine("none")
    return figure


def figure_bytes(figure: Figure, format: str) -> bytes:
    """Return the figure as a "png", "svg" or "pdf" file, the same bytes every time."""
    metadata = {
        "png": {"Software": "rewarded-lines"},
        "svg": {"Date": None, "Creator": "rewarded-lines"},
        "pdf": {"CreationDate": None, "Creator": "rewarded-lines"},
    }
    file = io.BytesIO()
    with house_style():
        figure.savefig(file, format=format, dpi=DPI, metadata=metadata[format])
    return file.getvalue()


def method_label(points: list[PointSummary]) -> str:
    """Return what a method is called in a legend, e.g. "LiNeS (α = β = 1)"."""
    name, alpha, beta = points[0].method, points[0].alpha, points[0].beta
    if any(point.checkpoint for point in points):
        return name
    if points[0].merge != "soup":
        return f"{name} ({points[0].merge}, α = {alpha:g}, β = {beta:g})"
    if any((point.alpha, point.beta) != (alpha, beta) for point in points):
        low, high = min(point.alpha for point in points), max(point.alpha for point in points)
        return f"{name} (α = {low:.2f} to {high:.2f}, β = 0)"
    if beta == 0:
        return "Rewarded Soups (β = 0)" if alpha == 1 else f"Rewarded Soups (α = {alpha:g}, β = 0)"
    return f"LiNeS (α = β = {alpha:g})" if alpha == beta else f"LiNeS (α = {alpha:g}, β = {beta:g})"


@contextmanager
def house_style() -> Iterator[None]:
    """Hold our style while drawing, whatever the user's own settings are.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        from matplotlib import style
    except ImportError as error:
        raise fail(
            "the figure needs matplotlib, which is not installed",
            remedy="pip install 'rewarded-lines[report]'",
        ) from error
    with style.context(["default", _STYLE]):
        yield


def _draw_legend(figure: Figure, summary: Summary) -> None:
    """Put the legend above the planes, in two columns if they fit."""
    handles, names = figure.axes[0].get_legend_handles_labels()
    title = f"Hypervolume above SFT [{volume_unit(summary)}] and its {summary.level:.0%} interval"
    options: dict[str, Any] = {
        "title": title,
        "loc": "outside upper left",
        "frameon": False,
        "alignment": "left",
    }
    legend = figure.legend(handles, names, ncols=2, columnspacing=1.5, **options)
    if legend.get_window_extent().width > figure.bbox.width:
        legend.remove()
        figure.legend(handles, names, **options)


def _draw_plane(axes: Axes, summary: Summary, plane: tuple[str, str]) -> None:
    axes.grid(color="0.88", linewidth=0.5)
    axes.set(xlabel=_axis_label(plane[0], summary), ylabel=_axis_label(plane[1], summary))
    if len(summary.objectives) == 2:
        _shade(axes, summary, plane)
    for index, points in enumerate(_lines(summary).values()):
        _draw_method(axes, points, plane, index, summary)
    _draw_crosses(axes, [summary.sft], plane, "0.25")
    axes.plot(*_coordinates([summary.sft], plane).T, **_SFT_STAR)
    policies = _coordinates([point for point, _ in policy_points(summary)], plane)
    if len(policies):
        axes.plot(*policies.T, **_POLICY_RING, label="policy, not merged")
    axes.plot([], [], **_CROSS, label=f"{summary.level:.0%} interval of a mean")
    axes.margins(0.09)


def _shade(axes: Axes, summary: Summary, plane: tuple[str, str]) -> None:
    """Tint what each method dominates above SFT, the smaller area over the larger to show what is added."""
    sft = _coordinates([summary.sft], plane)[0]
    volumes = {name: volume for name, volume in _hypervolumes(summary).items() if name in _lines(summary)}
    colours = dict(zip(volumes, cycle(COLOURS), strict=False))
    for method in sorted(volumes, key=lambda name: -volumes[name].value):
        corners = staircase(_coordinates(summary.methods()[method], plane), sft)
        # Opaque and below the grid: see-through tints would mix to a colour that is no method's.
        axes.fill(*corners.T, color=_mix(colours[method], "white", 0.84), linewidth=0, zorder=0.4)


def _draw_method(axes: Axes, points: list[PointSummary], plane: tuple[str, str], index: int, summary: Summary) -> None:
    colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
    volume = interval_text(_hypervolumes(summary)[points[0].method])
    _draw_crosses(axes, spread(points), plane, colour)
    axes.plot(
        *_coordinates(points, plane).T,
        color=colour,
        marker=marker,
        linestyle="-" if len(summary.policies) <= 2 and all(point.weights for point in points) else "none",
        label=f"{method_label(points)}: {volume}",
        **_FRONT,
    )


def _draw_crosses(axes: Axes, points: list[PointSummary], plane: tuple[str, str], colour: str) -> None:
    """Draw each point's interval along both axes."""
    thin: dict[str, Any] = {
        "color": colour,
        "linewidth": 0.8,
        "alpha": 0.7,
        "zorder": 2,
        "solid_capstyle": "butt",
    }
    for point in points:
        x, y = (_measure(point, name) for name in plane)
        axes.plot([x.low, x.high], [y.value, y.value], **thin)
        axes.plot([x.value, x.value], [y.low, y.high], **thin)


def staircase(points: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Return the outline of what points dominate above a reference, in a plane where both axes are maximised.

    Args:
        points: [points, 2].
        reference: [2].

    Returns:
        The corners in order, [corners, 2]; the reference alone when nothing dominates it.
    """
    above = points[(points > reference).all(axis=1)]
    front = np.unique(above[nondominated(above)], axis=0)
    corners = [reference]
    left = reference[0]
    for x, y in front:
        corners += [np.array([left, y]), np.array([x, y])]
        left = x
    corners.append(np.array([left, reference[1]]))
    return np.array(corners)


def _obstacles(axes: Axes, summary: Summary, plane: tuple[str, str]) -> tuple[np.ndarray, np.ndarray]:
    """Return boxes, in pixels: of what labels must not cover, and of the crosses, which they should not."""
    pixels = axes.transData.transform
    boxes = [boxes_around(pixels(_coordinates([summary.sft], plane)), 6 * _UNIT)]
    boxes += [boxes_around(pixels(_coordinates([point], plane)), 6 * _UNIT) for point, _ in policy_points(summary)]
    # With policies alone there are none.
    crosses = [np.empty((0, 4))]
    for points in _lines(summary).values():
        line = pixels(_coordinates(points, plane))
        boxes += [boxes_around(line, 3.2 * _UNIT), boxes_along(line)]
        for point in spread(points):
            x, y = (_measure(point, name) for name in plane)
            crosses.append(boxes_along(pixels(np.array([[x.low, y.value], [x.high, y.value]]))))
            crosses.append(boxes_along(pixels(np.array([[x.value, y.low], [x.value, y.high]]))))
    return np.concatenate(boxes), np.concatenate(crosses)


def _labels(axes: Axes, summary: Summary, plane: tuple[str, str]) -> Iterator[Label]:
    """Yield the labels, the most important first: names, then λ where it is one number, the last method's first."""
    pixels = axes.transData.transform
    named = [*policy_points(summary), (summary.sft, "SFT")]
    for point, name in named:
        yield Label(name, pixels(_coordinates([point], plane))[0], clearance=7 * _UNIT, must=True)
    methods = [*zip(_lines(summary).values(), cycle(COLOURS), strict=False)]
    written: dict[str, list[np.ndarray]] = {}
    for points, colour in reversed(methods):
        for point, text in _texts(points):
            anchor = pixels(_coordinates([point], plane))[0]
            alike = written.setdefault(text, [])
            # Where fronts lie on each other, one λ stands for the points of both.
            if all(np.hypot(*(anchor - other)) > 10 * _UNIT for other in alike):
                clearance = (7 if any(point is other for other, _ in named) else 4) * _UNIT
                yield Label(text, anchor, clearance, size=7, colour=_mix(colour, "black", 0.45))
                alike.append(anchor)


def _texts(points: list[PointSummary]) -> Iterator[tuple[PointSummary, str]]:
    """Yield the points of a method to be labelled, and how: every model by its name, some λ of two policies."""
    yield from ((point, point.checkpoint) for point in points if point.checkpoint)
    yield from ((point, f"λ = {point.lam:g}") for point in spread(points) if len(point.weights) == 2)


def spread(points: list[PointSummary]) -> list[PointSummary]:
    """Return the ends of a front and up to three points between, where all would be clutter."""
    last = len(points) - 1
    return [points[index] for index in sorted({round(share * last) for share in (0, 0.25, 0.5, 0.75, 1)})]


def policy_points(summary: Summary) -> list[tuple[PointSummary, str]]:
    """Return the points that are a policy itself, unmerged, with its name."""
    found = []
    for index, policy in enumerate(summary.policies):
        point = next((point for point in summary.points if is_policy(point, index)), None)
        if point is not None:
            found.append((point, policy))
    return found


def _lines(summary: Summary) -> dict[str, list[PointSummary]]:
    """Return the methods to draw; single policies have marks of their own."""
    return {name: points for name, points in summary.methods().items() if name != POLICIES}


def _hypervolumes(summary: Summary) -> dict[str, Estimate]:
    """Return each method's hypervolume above the SFT model's scores."""
    return {row.method: row.hypervolume for row in summary.hypervolumes if row.reference == "sft"}


def _mix(colour: str, other: str, share: float) -> tuple[float, ...]:
    """Return `colour` with a share of another in it, as red, green and blue from 0 to 1."""
    from matplotlib.colors import to_rgb

    return tuple((1 - share) * one + share * two for one, two in zip(to_rgb(colour), to_rgb(other), strict=True))


def _measure(point: PointSummary, name: str) -> Estimate:
    return point.kl if name == KL else point.rewards[name]


def _coordinates(points: list[PointSummary], plane: tuple[str, str]) -> np.ndarray:
    return np.array([[_measure(point, name).value for name in plane] for point in points]).reshape(-1, 2)


def _axis_label(name: str, summary: Summary) -> str:
    if name == KL:
        return f"{KL} [nats], lower is closer"
    return f"{with_unit(name, summary.rewards[name])}, higher is better →"

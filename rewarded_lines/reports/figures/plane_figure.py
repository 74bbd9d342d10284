"""One plane of two measures: every method's points, their intervals, their labels. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rewarded_lines.pareto.bootstrap import Estimate
from rewarded_lines.pareto.hypervolume import nondominated
from rewarded_lines.reports.figures.figure_style import Look, looks, mix, pixels_per_point, settled
from rewarded_lines.reports.figures.label_placement import Label, boxes_along, boxes_around, shorten, write_labels
from rewarded_lines.reports.summary import PointSummary, Summary
from rewarded_lines.reports.texts import method_labels, with_unit

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KL, PERPLEXITY = "KL to SFT", " perplexity"
# With more methods than this, only two are shaded and have their λ written, which keeps the figure readable.
FEW = 4
_TINT = 0.84
# The most characters of a name in a figure of one plane, of one in a small panel, and of a label on one line.
_LONG, _SHORT, _LINE = 24, 16, 42
Plane = tuple[str, str]
"""The names of the horizontal and the vertical measure; see `measure`."""


@dataclass(frozen=True)
class Drawn:
    """How the methods that make a front are drawn, the same in every panel of a figure.

    The `chosen` ones are shaded and have their λ written; `scale` of markers and lines is below 1 in small panels.
    """

    summary: Summary
    looks: dict[str, Look]
    labels: dict[str, str]
    chosen: tuple[str, ...]
    scale: float = 1.0

    @property
    def methods(self) -> dict[str, list[PointSummary]]:
        """The methods that make a front, with their points."""
        return self.summary.merged_methods()

    def line(self, name: str) -> dict[str, Any]:
        """Return how the line of a method is drawn: joined where its points have an order."""
        from matplotlib import rcParams

        joined = len(self.summary.policies) <= 2 and all(point.weights for point in self.methods[name])
        return self.looks[name].keywords(
            linewidth=self.scale * rcParams["lines.linewidth"],
            markersize=self.scale * rcParams["lines.markersize"],
            markeredgewidth=0.5 * self.scale,
            zorder=5 if name in self.chosen else 4,
            **({} if joined else {"linestyle": "none"}),
        )

    def mark(self, kind: str) -> dict[str, Any]:
        """Return how the mark of the "sft" model, a "policy" or an "interval" is drawn."""
        from matplotlib import rcParams

        size = self.scale * rcParams["lines.markersize"]
        marks: dict[str, dict[str, Any]] = {
            "sft": dict(marker="*", markersize=2.0 * size, color="black", markeredgecolor="white"),
            "policy": dict(marker="o", markersize=1.8 * size, color="black", markerfacecolor="none"),
            "interval": dict(marker="+", markersize=1.8 * size, color="0.4"),
        }
        edge = 0.5 if kind == "sft" else 0.9
        return dict(linestyle="none", markeredgewidth=edge * self.scale, zorder=6) | marks[kind]


def prepare(summary: Summary, scale: float = 1.0) -> Drawn:
    """Return how the methods of a summary are drawn in the style that is held.

    Of many methods two are chosen to be shaded and labelled: the first, which the others are compared with, and the
    one with the largest hypervolume above SFT.
    """
    names = list(summary.merged_methods())
    chosen = tuple(names)
    if len(names) > FEW:
        volumes = sft_volumes(summary)
        chosen = tuple(dict.fromkeys([names[0], max(names, key=lambda name: volumes[name].value)]))
    return Drawn(summary, dict(zip(names, looks(len(names)), strict=True)), method_labels(summary), chosen, scale)


def draw_plane(axes: Axes, drawn: Drawn, plane: Plane, shade: bool = False) -> None:
    """Draw the points of every method, the SFT model and the policies; crosses are intervals of some of them."""
    summary = drawn.summary
    axes.grid(True)
    if shade:
        _shade(axes, drawn, plane)
    for name, points in drawn.methods.items():
        _draw_crosses(axes, _crossed(drawn, name), plane, drawn.looks[name].colour, drawn.scale)
        axes.plot(*coordinates(points, plane).T, label=drawn.labels[name], **drawn.line(name))
    _draw_crosses(axes, [summary.sft], plane, "0.25", drawn.scale)
    axes.plot(*coordinates([summary.sft], plane).T, **drawn.mark("sft"))
    policies = coordinates([point for point, _ in summary.policy_points()], plane)
    if len(policies):
        axes.plot(*policies.T, **drawn.mark("policy"))
    axes.margins(0.09)


def freeze(figure: Figure, planes: Sequence[tuple[Axes, Plane]], drawn: Drawn) -> Figure:
    """Lay the figure out and write names and some λ into its planes; return it with every part fixed in its place."""
    settled(figure)
    for axes, plane in planes:
        write_labels(axes, _labels(axes, drawn, plane), *_obstacles(axes, drawn, plane))
    return figure


def axis_label(name: str, summary: Summary, lines: int = 1) -> str:
    """Return the label of a measure's axis: its name, its unit, which way is better; on two lines if it is long."""
    if name == KL:
        parts = [f"{KL} [nats]", "lower is closer"]
    elif name not in summary.rewards:
        parts = [f"{shorten(name.removesuffix(PERPLEXITY), _SHORT)}{PERPLEXITY} [per token]", "lower is better"]
    else:
        audit = " (audit)" if name in summary.audits else ""
        short = shorten(name, _LONG if lines == 1 else _SHORT)
        parts = [with_unit(short, shorten(summary.rewards[name], _SHORT)) + audit, "higher is better →"]
    whole = ", ".join(parts)
    return whole if lines == 1 and len(whole) <= _LINE else "\n".join(parts)


def measure(point: PointSummary, name: str) -> Estimate:
    """Return a point's measure: a reward by its name, `KL`, or the name of control texts followed by `PERPLEXITY`."""
    if name == KL:
        return point.kl
    if (texts := name.removesuffix(PERPLEXITY)) != name and texts in point.perplexities:
        return point.perplexities[texts]
    return point.rewards[name]


def coordinates(points: Sequence[PointSummary], plane: Plane) -> np.ndarray:
    """Return the means of points in a plane, [points, 2]."""
    return np.array([[measure(point, name).value for name in plane] for point in points]).reshape(-1, 2)


def staircase(points: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Return the outline of what points, [points, 2], dominate above a reference, [2], both measures maximised.

    Returns:
        The corners in order, [corners, 2]; only the reference when no point dominates it.
    """
    above = points[(points > reference).all(axis=1)]
    corners = [tuple(reference)]
    for x, y in np.unique(above[nondominated(above)], axis=0):
        corners += [(corners[-1][0], y), (x, y)]
    return np.array([*corners, (corners[-1][0], reference[1])])


def spread(points: Sequence[PointSummary], count: int = 5) -> list[PointSummary]:
    """Return at most `count` points of a front in the order of λ: its ends and some between, or only the middle one."""
    last = len(points) - 1
    shares = [0.5] if count == 1 else [place / (count - 1) for place in range(count)]
    return [points[index] for index in sorted({round(share * last) for share in shares})]


def sft_volumes(summary: Summary) -> dict[str, Estimate]:
    """Return each method's hypervolume above the SFT model's scores."""
    return {row.method: row.hypervolume for row in summary.hypervolumes if row.reference == "sft"}


def tint(look: Look) -> tuple[float, float, float]:
    """Return the colour of the area that a method dominates."""
    return mix(look.colour, "white", _TINT)


def _shade(axes: Axes, drawn: Drawn, plane: Plane) -> None:
    """Tint what each method dominates above SFT, smaller areas over larger ones."""
    sft = coordinates([drawn.summary.sft], plane)[0]
    volumes = sft_volumes(drawn.summary)
    for name in sorted(drawn.chosen, key=lambda name: -volumes[name].value):
        corners = staircase(coordinates(drawn.methods[name], plane), sft)
        # Opaque and below the grid: transparent tints would mix to a colour that belongs to no method.
        # The edge tells areas apart in grey, where tints are alike.
        colour = drawn.looks[name].colour
        axes.fill(*corners.T, fc=tint(drawn.looks[name]), ec=mix(colour, "white", 0.45), linewidth=0.5, zorder=0.4)


def _crossed(drawn: Drawn, name: str) -> list[PointSummary]:
    """Return the points of a method whose intervals are drawn."""
    return spread(drawn.methods[name], 5 if name in drawn.chosen else 1)


def _arms(points: Sequence[PointSummary], plane: Plane) -> Iterator[np.ndarray]:
    """Yield the two lines of the cross of each point, [ends, 2]: its intervals along both axes."""
    for point in points:
        x, y = (measure(point, name) for name in plane)
        yield np.array([[x.low, y.value], [x.high, y.value]])
        yield np.array([[x.value, y.low], [x.value, y.high]])


def _draw_crosses(axes: Axes, points: Sequence[PointSummary], plane: Plane, colour: str, scale: float) -> None:
    for ends in _arms(points, plane):
        thin: dict[str, Any] = dict(color=colour, linewidth=0.9 * scale, linestyle="-", solid_capstyle="butt")
        axes.plot(*ends.T, marker="", alpha=0.7, zorder=2, **thin)


def _obstacles(axes: Axes, drawn: Drawn, plane: Plane) -> tuple[np.ndarray, np.ndarray]:
    """Return boxes, in pixels: of what labels must not cover, and of the crosses, which they should not."""
    pixels, unit = axes.transData.transform, pixels_per_point(axes.figure) * drawn.scale
    marked = [drawn.summary.sft, *(point for point, _ in drawn.summary.policy_points())]
    boxes = [boxes_around(pixels(coordinates(marked, plane)), 6 * unit)]
    crossed = [drawn.summary.sft]
    for name, points in drawn.methods.items():
        line = pixels(coordinates(points, plane))
        boxes.append(boxes_around(line, 3.2 * unit))
        if drawn.line(name)["linestyle"] != "none":
            boxes.append(boxes_along(line, 1.1 * unit))
        crossed += _crossed(drawn, name)
    return np.concatenate(boxes), np.concatenate([boxes_along(pixels(ends)) for ends in _arms(crossed, plane)])


def _labels(axes: Axes, drawn: Drawn, plane: Plane) -> Iterator[Label]:
    """Yield the labels, the most important first: names, then λ where it is one number, the last method's first."""
    unit = pixels_per_point(axes.figure) * drawn.scale

    def anchor_of(point: PointSummary) -> np.ndarray:
        return np.asarray(axes.transData.transform(coordinates([point], plane))[0])

    named = [*drawn.summary.policy_points(), (drawn.summary.sft, "SFT")]
    size, smaller, longest = ("medium", "small", _LONG) if drawn.scale == 1 else ("small", "x-small", _SHORT)
    for point, name in named:
        yield Label(shorten(name, longest), anchor_of(point), clearance=7 * unit, must=True, size=size)
    written: dict[str, list[np.ndarray]] = {}
    for method, point, text in _texts(drawn):
        anchor = anchor_of(point)
        alike = written.setdefault(text, [])
        # Where fronts lie on each other, one λ stands for the points of both.
        if all(np.hypot(*(anchor - other)) > 10 * unit for other in alike):
            clearance = (7 if any(point is other for other, _ in named) else 4) * unit
            colour = mix(drawn.looks[method].colour, "black", 0.45)
            yield Label(text, anchor, clearance, size=smaller, colour=colour)
            alike.append(anchor)


def _texts(drawn: Drawn) -> Iterator[tuple[str, PointSummary, str]]:
    """Yield a method, a point and its label: first every model by its name, then some λ of two policies, ends first."""
    reverse = list(reversed(drawn.methods.items()))
    yield from ((name, point, point.checkpoint) for name, points in reverse for point in points if point.checkpoint)
    for name, points in reverse:
        if name in drawn.chosen:
            some = [point for point in spread(points, 5) if len(point.weights) == 2]
            yield from ((name, point, f"λ = {point.lam:.3g}") for point in [*some[:1], *some[-1:], *some[1:-1]])

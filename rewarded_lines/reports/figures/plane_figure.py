"""A plane of two measures with points, intervals and labels. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rewarded_lines.config import SFT
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
# With more methods, only two are shaded and labelled with λ.
FEW = 4
_TINT = 0.84
# At most this many characters of a name in a single plane, in a small panel, and on one line.
_LONG, _SHORT, _LINE = 24, 16, 42
Plane = tuple[str, str]
"""The names of the horizontal and vertical measure, see `measure`."""


@dataclass(frozen=True)
class Drawn:
    """The appearance of each method, equal in all panels of a figure.

    `chosen` methods are shaded and labelled with λ; `scale` applies to markers and lines.
    """

    summary: Summary
    looks: dict[str, Look]
    labels: dict[str, str]
    chosen: tuple[str, ...]
    scale: float = 1.0

    @property
    def methods(self) -> dict[str, list[PointSummary]]:
        """The points of each method that forms a front."""
        return self.summary.merged_methods()

    def line(self, name: str) -> dict[str, Any]:
        """Return the keywords of a method's line; points without an order are not joined."""
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
        """Return the keywords of the mark "sft", "policy" or "interval"."""
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
    """Return the appearance of the methods in the current style.

    Of many methods, the first and the one with the largest hypervolume above SFT are chosen.
    """
    names = list(summary.merged_methods())
    chosen = tuple(names)
    if len(names) > FEW:
        volumes = sft_volumes(summary)
        best = max(names, key=lambda name: volumes[name].value)
        chosen = (names[0], best) if best != names[0] else (best,)
    styles = dict(zip(names, looks(len(names)), strict=True))
    return Drawn(summary, styles, method_labels(summary), chosen, scale)


def draw_plane(axes: Axes, drawn: Drawn, plane: Plane, shade: bool = False) -> None:
    """Draw all points, and crosses for the intervals of some points."""
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
    """Fix the layout, then write names and some λ into the planes."""
    settled(figure)
    for axes, plane in planes:
        write_labels(axes, _labels(axes, drawn, plane), *_obstacles(axes, drawn, plane))
    return figure


def axis_label(name: str, summary: Summary, lines: int = 1) -> str:
    """Return an axis label with name, unit and better direction; a long one has two lines."""
    if name == KL:
        parts = [f"{KL} [nats]", "lower is closer"]
    elif name not in summary.rewards:
        texts = shorten(name.removesuffix(PERPLEXITY), _SHORT)
        parts = [f"{texts}{PERPLEXITY} [per token]", "lower is better"]
    else:
        audit = " (audit)" if name in summary.audits else ""
        short = shorten(name, _LONG if lines == 1 else _SHORT)
        unit = shorten(summary.rewards[name], _SHORT)
        parts = [with_unit(short, unit) + audit, "higher is better →"]
    whole = ", ".join(parts)
    return whole if lines == 1 and len(whole) <= _LINE else "\n".join(parts)


def measure(point: PointSummary, name: str) -> Estimate:
    """Return a measure of a point: a reward, `KL`, or a set of control texts plus `PERPLEXITY`."""
    if name == KL:
        return point.kl
    if (texts := name.removesuffix(PERPLEXITY)) != name and texts in point.perplexities:
        return point.perplexities[texts]
    return point.rewards[name]


def coordinates(points: Sequence[PointSummary], plane: Plane) -> np.ndarray:
    """Return the means of points in a plane, [points, 2]."""
    means = [[measure(point, name).value for name in plane] for point in points]
    return np.array(means).reshape(-1, 2)


def staircase(points: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Return the outline, [corners, 2], of the area that maximised points, [points, 2], dominate."""
    above = points[(points > reference).all(axis=1)]
    corners = [tuple(reference)]
    for x, y in np.unique(above[nondominated(above)], axis=0):
        corners += [(corners[-1][0], y), (x, y)]
    return np.array([*corners, (corners[-1][0], reference[1])])


def spread(points: Sequence[PointSummary], count: int = 5) -> list[PointSummary]:
    """Return at most `count` evenly spaced points of a front; 1 returns the middle one."""
    last = len(points) - 1
    shares = [0.5] if count == 1 else [place / (count - 1) for place in range(count)]
    return [points[index] for index in sorted({round(share * last) for share in shares})]


def sft_volumes(summary: Summary) -> dict[str, Estimate]:
    """Return each method's hypervolume above the SFT model's scores."""
    return {row.method: row.hypervolume for row in summary.hypervolumes if row.reference == SFT}


def tint(look: Look) -> tuple[float, float, float]:
    """Return the colour of a method's area."""
    return mix(look.colour, "white", _TINT)


def _shade(axes: Axes, drawn: Drawn, plane: Plane) -> None:
    """Tint the area that each chosen method dominates above SFT, the largest first."""
    sft = coordinates([drawn.summary.sft], plane)[0]
    volumes = sft_volumes(drawn.summary)
    for name in sorted(drawn.chosen, key=lambda name: -volumes[name].value):
        corners = staircase(coordinates(drawn.methods[name], plane), sft)
        # Opaque, because transparent tints would mix; the edge separates areas in grey.
        look = drawn.looks[name]
        edge = mix(look.colour, "white", 0.45)
        axes.fill(*corners.T, fc=tint(look), ec=edge, linewidth=0.5, zorder=0.4)


def _crossed(drawn: Drawn, name: str) -> list[PointSummary]:
    return spread(drawn.methods[name], 5 if name in drawn.chosen else 1)


def _arms(points: Sequence[PointSummary], plane: Plane) -> Iterator[np.ndarray]:
    """Yield the two lines of each point's cross, [ends, 2]."""
    for point in points:
        x, y = (measure(point, name) for name in plane)
        yield np.array([[x.low, y.value], [x.high, y.value]])
        yield np.array([[x.value, y.low], [x.value, y.high]])


def _draw_crosses(axes: Axes, points: Sequence[PointSummary], plane: Plane, colour: str, scale: float) -> None:
    look: dict[str, Any] = dict(color=colour, linewidth=0.9 * scale, linestyle="-", marker="", alpha=0.7)
    for ends in _arms(points, plane):
        axes.plot(*ends.T, solid_capstyle="butt", zorder=2, **look)


def _obstacles(axes: Axes, drawn: Drawn, plane: Plane) -> tuple[np.ndarray, np.ndarray]:
    """Return boxes in pixels: the marks and lines, which labels must not cover, and the crosses."""
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
    crosses = [boxes_along(pixels(ends)) for ends in _arms(crossed, plane)]
    return np.concatenate(boxes), np.concatenate(crosses)


def _labels(axes: Axes, drawn: Drawn, plane: Plane) -> Iterator[Label]:
    """Yield the labels, the most important first: names, then λ, the last method first."""
    unit = pixels_per_point(axes.figure) * drawn.scale

    def anchor_of(point: PointSummary) -> np.ndarray:
        return np.asarray(axes.transData.transform(coordinates([point], plane))[0])

    singles = drawn.summary.policy_points()
    if len(singles) > FEW:
        # The names of more would hide the points.
        singles = [max(singles, key=lambda one: measure(one[0], plane[1]).value)]
    named = [*singles, (drawn.summary.sft, "SFT")]
    single = ("medium", "small", _LONG)
    size, smaller, longest = single if drawn.scale == 1 else ("small", "x-small", _SHORT)
    for point, name in named:
        yield Label(shorten(name, longest), anchor_of(point), clearance=7 * unit, must=True, size=size)
    written: dict[str, list[np.ndarray]] = {}
    for method, point, text in _texts(drawn):
        anchor = anchor_of(point)
        alike = written.setdefault(text, [])
        # Where fronts overlap, points of both share one λ label.
        if all(np.hypot(*(anchor - other)) > 10 * unit for other in alike):
            clearance = (7 if any(point is other for other, _ in named) else 4) * unit
            colour = mix(drawn.looks[method].colour, "black", 0.45)
            yield Label(text, anchor, clearance, size=smaller, colour=colour)
            alike.append(anchor)


def _texts(drawn: Drawn) -> Iterator[tuple[str, PointSummary, str]]:
    """Yield method, point and label: first the baselines' names, then λ or μ of two policies, ends first."""
    reverse = list(reversed(drawn.methods.items()))
    for name, points in reverse:
        yield from ((name, point, point.checkpoint) for point in points if point.checkpoint)
    for name, points in reverse:
        if name in drawn.chosen:
            some = [point for point in spread(points) if len(point.weights) == 2]
            for point in [*some[:1], *some[-1:], *some[1:-1]]:
                yield name, point, f"{'μ' if point.preference else 'λ'} = {point.lam:.3g}"

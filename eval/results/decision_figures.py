"""The two figures of docs/which-merge.md, drawn from the record of every method with and without LiNeS."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from kept_records import HERE, Record, every_method

from rewarded_lines.merger.methods import METHODS
from rewarded_lines.reports.figures.figure_style import (
    WIDE,
    Look,
    blank_figure,
    legend_above,
    looks,
    pixels_per_point,
    settled,
    write_figure,
)
from rewarded_lines.reports.figures.label_placement import Label, boxes_along, boxes_around, write_labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DOCS = HERE.parents[1] / "docs"
# The three rows of a rule, in the order of a triple.
ROWS = ("alone", "with LiNeS", "one factor, LiNeS' norm")
_LEGEND = {"linestyle": "none"}


def write_figures(folder: Path = DOCS, root: Path = HERE) -> None:
    """Write both, as PNG."""
    one = every_method(root)
    write_figure(folder / "which-merge-kl.png", lambda: kl_figure(one))
    write_figure(folder / "which-merge-gain.png", lambda: gain_figure(one))


def kl_figure(one: Record) -> Figure:
    """Draw each method's hypervolume above SFT, with its interval, over the largest KL of its points."""
    figure = blank_figure(WIDE, 4.6)
    axes, styles = figure.add_subplot(), _styles()
    lines: list[np.ndarray] = []
    bars: list[np.ndarray] = []
    labels: dict[tuple[float, ...], tuple[np.ndarray, list[str]]] = {}
    for label, *names in one.triples:
        places = [(one.most(name, "kl"), one.hv(name)) for name in names]
        # From the rule alone to its norm-matched row to LiNeS.
        path = [places[index] for index in (0, 2, 1)]
        line = np.array([(x, volume.value) for x, volume in path])
        axes.plot(*line.T, color="0.8", linewidth=0.9, linestyle="-", marker="", zorder=1)
        lines.append(line)
        for (x, volume), look in zip(places, styles, strict=True):
            _interval(axes, [x, x], [volume.low, volume.high], look)
            bars.append(np.array([(x, volume.low), (x, volume.high)]))
            axes.plot([x], [volume.value], **look.keywords(linestyle="none", zorder=3))
        # Rules whose points coincide share a label.
        labels.setdefault(tuple(line[2].round(1)), (line[2], []))[1].append(_name(label))
    axes.set(
        xlabel="largest KL to SFT among the λ [nats]", ylabel=f"hypervolume above SFT [{one.unit}]", ylim=(-0.4, None)
    )
    # Room for the names at the right.
    axes.set_xlim(0, 1.12 * axes.get_xlim()[1])
    axes.grid(True)
    legend_above(figure, [(row, look.keywords(**_LEGEND)) for row, look in zip(ROWS, styles, strict=True)], 3)
    _label(settled(figure), axes, labels.values(), lines, bars)
    return figure


def _label(
    figure: Figure,
    axes: Axes,
    labels: Iterable[tuple[np.ndarray, list[str]]],
    lines: list[np.ndarray],
    bars: list[np.ndarray],
) -> None:
    """Write the names of rules where they cover no marker and no interval, and if possible no line."""
    unit, pixels = pixels_per_point(figure), axes.transData.transform
    markers = [boxes_around(pixels(line), 3.5 * unit) for line in lines]
    taken = np.concatenate([*markers, *(boxes_along(pixels(bar)) for bar in bars)])
    thin = np.concatenate([boxes_along(pixels(line)) for line in lines])
    named = [Label(", ".join(names), pixels(at), 4 * unit, must=True, size="small") for at, names in labels]
    write_labels(axes, named, taken, thin)


def gain_figure(one: Record) -> Figure:
    """Draw each method's hypervolume minus that of Rewarded Soups, paired by prompt, with its interval."""
    order = sorted(one.triples, key=lambda row: one.hv(row[2]).value)
    figure = blank_figure(WIDE, 1.0 + 0.34 * len(order))
    axes, styles = figure.add_subplot(), _styles()
    for place, (_, *names) in enumerate(order):
        for aside, name, look in zip((-0.22, 0.22, 0.0), names, styles, strict=True):
            if name != "soup":
                gain = one.diff(name, "soup")
                _interval(axes, [gain.low, gain.high], [place + aside, place + aside], look)
                axes.plot([gain.value], [place + aside], **look.keywords(linestyle="none", zorder=3))
    axes.axvline(0, color="0.3", linewidth=0.8)
    axes.set_yticks(range(len(order)), [_name(label) for label, *_ in order])
    axes.set_xlabel(f"hypervolume above SFT, minus Rewarded Soups' [{one.unit}]")
    axes.grid(True, axis="x")
    legend_above(figure, [(row, look.keywords(**_LEGEND)) for row, look in zip(ROWS, styles, strict=True)], 3)
    return settled(figure)


def _styles() -> list[Look]:
    return looks(len(ROWS))


def _name(method: str) -> str:
    """Return a rule as the README's table names it; soup by its paper's name."""
    return "Rewarded Soups" if method == "soup" else METHODS[method].label or method


def _interval(axes: Any, xs: list[float], ys: list[float], look: Look) -> None:
    axes.plot(xs, ys, color=look.colour, linewidth=1.1, marker="", linestyle="-", zorder=2)

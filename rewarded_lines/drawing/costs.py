"""What reward costs: each reward over KL to SFT, or over the perplexity of control texts. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from rewarded_lines.drawing.legends import draw_legend
from rewarded_lines.drawing.planes import KL, PERPLEXITY, axis_label, columns_of, draw_plane, freeze, measure, prepare
from rewarded_lines.drawing.style import PAPER, PLANE, WIDE, blank_figure, house_style
from rewarded_lines.summaries.summary import Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Between two numbers at an axis, as a share of its length.
_APART = 0.12
# From such a ratio of highest to lowest on, perplexities are drawn on a logarithmic scale.
_FAR = 3.0


def kl_figure(summary: Summary, style: str = PAPER) -> Figure:
    """Draw the mean of every reward, audits too, over KL to the SFT model in nats per response; a panel for each.

    Args:
        summary: the numbers.
        style: see `house_style`.

    Raises:
        UserError: matplotlib is not installed, or there is no such style.
    """
    return _over([KL], summary, style)


def forgetting_figure(summary: Summary, style: str = PAPER) -> Figure | None:
    """Draw the mean of every reward over the perplexity of control texts, a row of panels for each set of them; None
    for a run without such texts.

    Args:
        summary: the numbers.
        style: see `house_style`.

    Raises:
        UserError: matplotlib is not installed, or there is no such style.
    """
    costs = [f"{name}{PERPLEXITY}" for name in summary.controls]
    return _over(costs, summary, style) if costs else None


def _over(costs: Sequence[str], summary: Summary, style: str) -> Figure:
    rewards = list(summary.rewards)
    rows, columns = columns_of(len(rewards), 3 if len(rewards) != 4 else 2)
    with house_style(style):
        drawn = prepare(summary, scale=1.0 if columns == 1 else 0.8)
        width = PLANE if columns == 1 else WIDE
        figure = blank_figure(width, len(costs) * rows * (0.9 * width / columns) + 1.0)
        planes = []
        panels = [
            (place * rows * columns + index, cost, reward)
            for place, cost in enumerate(costs)
            for index, reward in enumerate(rewards)
        ]
        for index, cost, reward in panels:
            axes = figure.add_subplot(len(costs) * rows, columns, index + 1)
            draw_plane(axes, drawn, (cost, reward))
            below = _below(cost, summary, _stretch(axes, summary, cost), columns)
            axes.set(xlabel=below, ylabel=axis_label(reward, summary, lines=min(columns, 2)))
            planes.append((axes, (cost, reward)))
        draw_legend(figure, drawn, volumes=False, shaded=False)
        freeze(figure, planes, drawn)
    return figure


def _below(cost: str, summary: Summary, scale: str, columns: int) -> str:
    """Return the label of the costs' axis, on as many lines as panels of this width need."""
    name, *rest = [*axis_label(cost, summary, lines=2).split("\n"), *([scale] if scale else [])]
    if columns > 2:
        # Name and unit of the control perplexity alone are longer than such a panel.
        name = name.replace(" [", "\n[") if cost != KL else name
        return "\n".join([name, *rest])
    return f"{name}\n{', '.join(rest)}"


def _stretch(axes: Axes, summary: Summary, cost: str) -> str:
    """Give the costs an axis where a few points far from SFT do not press all others together; return its name.

    KL grows with the square of a small step, so its root is drawn, as by Gao et al., "Scaling Laws for Reward Model
    Overoptimization", 2023; estimates may be below 0.
    """
    values = [measure(point, cost).value for point in summary.points]
    if cost == KL:
        signed_root = (lambda kl: np.sign(kl) * np.sqrt(np.abs(kl)), lambda root: np.sign(root) * root**2)
        axes.set_xscale("function", functions=signed_root)
        _number(axes, [0.0, *_decades(1, 2, 5)])
        return "square-root scale"
    if max(values) / min(values) < _FAR:
        return ""
    axes.set_xscale("log")
    _number(axes, _decades(1, 1.5, 2, 3, 5, 7))
    return "log scale"


def _decades(*steps: float) -> list[float]:
    """Return round numbers, the largest first."""
    return [step * 10.0**power for power in range(6, -3, -1) for step in reversed(steps)]


def _number(axes: Axes, candidates: Sequence[float]) -> None:
    """Write those of `candidates` at the x axis that lie on it and apart from those before them."""
    low, high = axes.get_xlim()
    kept: list[tuple[float, float]] = []
    for value in candidates:
        if low <= value <= high:
            place = axes.transAxes.inverted().transform(axes.transData.transform((value, 0.0)))[0]
            if all(abs(place - other) >= _APART for _, other in kept):
                kept.append((value, place))
    axes.set_xticks([value for value, _ in kept], [f"{value:g}" for value, _ in kept])
    axes.set_xticks([], minor=True)

"""Training curves: reward and KL of every policy over the steps of its training. Needs matplotlib."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rewarded_lines.drawing.labels import shorten
from rewarded_lines.drawing.planes import columns_of
from rewarded_lines.drawing.style import PAPER, PLANE, WIDE, blank_figure, house_style, looks
from rewarded_lines.summaries.training import Training

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARKED = 12


@dataclass(frozen=True)
class Panel:
    """One measure over steps: its axis, and what trainers call it."""

    label: str
    keys: tuple[str, ...]


# KL is of whole responses in PPO's log and of single tokens in RLOO's, so they are two measures.
PANELS = (
    Panel("reward in training\n[{unit}], higher is better →", ("objective/scores", "reward")),
    Panel("KL to SFT\n[nats per response], lower is closer", ("objective/kl",)),
    Panel("KL to SFT\n[nats per token], lower is closer", ("kl",)),
    Panel("margin of chosen over rejected\n[nats × β], higher is better →", ("rewards/margins",)),
    Panel("pairs in the right order [share]\nhigher is better →", ("rewards/accuracies",)),
)


def training_figure(trainings: Sequence[Training], style: str = PAPER) -> Figure | None:
    """Draw what was logged in the training of each policy: reward and KL of PPO and RLOO, margin and accuracy of DPO.

    Policies of further training seeds have the colour of the first, their lines thinner. SD on SFT: rewards in units
    of their standard deviation over the SFT model's responses.

    Args:
        trainings: the logs; see `read_trainings`.
        style: see `house_style`.

    Returns:
        The figure, or None where nothing of that was logged.

    Raises:
        UserError: matplotlib is not installed, or there is no such style.
    """
    panels = [panel for panel in PANELS if any(_points(one, panel)[0] for one in trainings)]
    if not panels:
        return None
    rows, columns = columns_of(len(panels), 3 if len(panels) != 4 else 2)
    with house_style(style):
        width = PLANE if columns == 1 else WIDE
        figure = blank_figure(width, 2.9 * rows + 0.5)
        for index, panel in enumerate(panels):
            _draw_panel(figure.add_subplot(rows, columns, index + 1), trainings, panel)
        _draw_legend(figure, trainings)
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
    return figure


def _draw_panel(axes: Axes, trainings: Sequence[Training], panel: Panel) -> None:
    styles = _styles(trainings)
    axes.grid(True)
    for one in trainings:
        steps, values = _points(one, panel)
        if steps:
            thin = dict(linewidth=0.6, marker="", alpha=0.7) if one.run else {}
            every = max(1, len(steps) // _MARKED)
            axes.plot(steps, values, label=one.policy, markevery=every, **(styles[one.policy] | thin))
    units = {"SD on SFT" if one.standardized else "own unit" for one in trainings}
    axes.set_ylabel(panel.label.format(unit=" or ".join(sorted(units))))
    axes.set_xlabel("training step")
    axes.margins(0.05)


def _styles(trainings: Sequence[Training]) -> dict[str, dict[str, Any]]:
    names = list(dict.fromkeys(one.policy for one in trainings))
    return {
        name: dict(
            color=look.colour,
            marker=look.marker,
            linestyle=look.line,
            markeredgecolor="white",
            markeredgewidth=0.5,
        )
        for name, look in zip(names, looks(len(names)), strict=True)
    }


def _draw_legend(figure: Figure, trainings: Sequence[Training]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], label=shorten(name, 24), **line) for name, line in _styles(trainings).items()]
    if any(one.run for one in trainings):
        handles.append(Line2D([], [], label="other training seeds", color="0.4", linewidth=0.6, marker=""))
    figure.legend(handles=handles, loc="outside upper left", ncols=4, frameon=False, columnspacing=1.5)


def _points(training: Training, panel: Panel) -> tuple[list[int], list[float]]:
    """Return the steps and values of a measure, where the log has it."""
    values = next((training.values[key] for key in panel.keys if key in training.values), [])
    kept = [(step, value) for step, value in zip(training.steps, values, strict=False) if math.isfinite(value)]
    return [step for step, _ in kept], [value for _, value in kept]

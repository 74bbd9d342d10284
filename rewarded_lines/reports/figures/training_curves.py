"""Training curves from the logs beside the policies. The figure needs matplotlib."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rewarded_lines.evaluator.records import Run
from rewarded_lines.folders import METRICS_FILE, TRAINING_FILE, json_object_in
from rewarded_lines.references import located
from rewarded_lines.reports.figures.figure_style import (
    PLANE,
    WIDE,
    blank_figure,
    columns_of,
    legend_above,
    looks,
    settled,
)
from rewarded_lines.reports.figures.label_placement import shorten

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# At most this many markers on a line.
_MARKED = 12
# Axis label → names in trainers' logs. PPO logs KL per response, RLOO and GRPO per token.
_PANELS = {
    "reward in training\n[{unit}], higher is better →": ("objective/scores", "reward"),
    "KL to SFT\n[nats per response], lower is closer": ("objective/kl",),
    "KL to SFT\n[nats per token], lower is closer": ("kl",),
    "margin of chosen over rejected\n[nats × β], higher is better →": ("rewards/margins",),
    "pairs in the right order [share]\nhigher is better →": ("rewards/accuracies",),
}


@dataclass(frozen=True)
class Training:
    """The log of one policy's training.

    Attributes:
        run: index of its run.
        lines: of the log: the step of the optimizer and measures, by the trainer's names.
        standardized: rewards are in standard deviations over SFT's responses.
    """

    policy: str
    run: int
    lines: list[dict[str, Any]]
    standardized: bool

    def measured(self, names: Sequence[str]) -> tuple[list[int], list[float]]:
        """Return the steps and finite values of the first of `names` that was logged."""
        name = next((name for name in names if any(name in line for line in self.lines)), "")
        kept = [(line["step"], line[name]) for line in self.lines if math.isfinite(line.get(name, math.nan))]
        return [step for step, _ in kept], [value for _, value in kept]


def read_trainings(runs: Sequence[Run]) -> list[Training]:
    """Return the logs beside the policies of runs; a missing or damaged log is left out."""
    found = []
    for index, run in enumerate(runs):
        for name, policy in run.header.get("policies", {}).items():
            if isinstance(policy, Mapping):
                folder = Path(located(str(policy.get("path", "")), run.folder))
                if lines := _lines(folder / METRICS_FILE):
                    standardized = bool(json_object_in(folder / TRAINING_FILE).get("standardized"))
                    found.append(Training(name, index, lines, standardized))
    return found


def training_figure(trainings: Sequence[Training]) -> Figure | None:
    """Draw reward and KL of PPO, RLOO and GRPO, margin and accuracy of DPO, over training steps.

    Other training seeds have thinner lines of the same colour. None if no log has one of these measures.
    """
    panels = {label: names for label, names in _PANELS.items() if any(one.measured(names)[0] for one in trainings)}
    if not panels:
        return None
    policies = list(dict.fromkeys(one.policy for one in trainings))
    styles = {name: look.keywords() for name, look in zip(policies, looks(len(policies)), strict=True)}
    rows, columns = columns_of(len(panels), 2 if len(panels) == 4 else 3)
    figure = blank_figure(PLANE if columns == 1 else WIDE, 2.9 * rows + 0.5)
    units = sorted({"SD on SFT" if one.standardized else "own unit" for one in trainings})
    for index, (label, names) in enumerate(panels.items()):
        axes = figure.add_subplot(rows, columns, index + 1)
        for one in trainings:
            steps, values = one.measured(names)
            if steps:
                thin = dict(linewidth=0.6, marker="", alpha=0.7) if one.run else {}
                every = max(1, len(steps) // _MARKED)
                axes.plot(steps, values, label=one.policy, markevery=every, **(styles[one.policy] | thin))
        axes.grid(True)
        axes.margins(0.05)
        axes.set(xlabel="training step", ylabel=label.format(unit=" or ".join(units)))
    lines = [(shorten(name, 24), style) for name, style in styles.items()]
    if any(one.run for one in trainings):
        lines.append(("other training seeds", dict(color="0.4", linewidth=0.6, marker="")))
    legend_above(figure, lines, columns=4)
    return settled(figure)


def _lines(path: Path) -> list[dict[str, Any]]:
    """Return the numbers in the lines of a log that have a step and a measure; [] if the file is not a log."""
    try:
        lines = [json.loads(line).items() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError, AttributeError):
        return []
    numbers = [{key: value for key, value in line if isinstance(value, int | float)} for line in lines]
    return [line for line in numbers if isinstance(line.get("step"), int) and len(line) > 1]

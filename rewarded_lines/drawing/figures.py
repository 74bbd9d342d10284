"""All figures that a run has data for, by the names of their files. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rewarded_lines.drawing.costs import forgetting_figure, kl_figure
from rewarded_lines.drawing.curves import training_figure
from rewarded_lines.drawing.fronts import front_figure
from rewarded_lines.drawing.parallel import parallel_figure
from rewarded_lines.drawing.simplex import simplex_figure
from rewarded_lines.drawing.style import PAPER
from rewarded_lines.summaries.summary import Summary
from rewarded_lines.summaries.training import Training

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAMES = ("front", "kl", "forgetting", "simplex", "parallel", "training", "depth")
"""Every figure that a report may have; "depth" only when it is asked for, as the weights are read for it."""


def figures(summary: Summary, trainings: Sequence[Training], style: str = PAPER) -> Iterator[tuple[str, Figure]]:
    """Yield the figures of a run, each with its name: the front always, others where there is something to draw.

    Args:
        summary: the numbers.
        trainings: the logs of its policies' training, if they are there.
        style: see `house_style`.

    Raises:
        UserError: matplotlib is not installed, or there is no such style.
    """
    yield "front", front_figure(summary, style)
    # The front of a single reward is drawn over KL already.
    if len(summary.rewards) > 1:
        yield "kl", kl_figure(summary, style)
    others = {
        "forgetting": forgetting_figure(summary, style),
        "simplex": simplex_figure(summary, style),
        "parallel": parallel_figure(summary, style),
        "training": training_figure(trainings, style),
    }
    yield from ((name, figure) for name, figure in others.items() if figure is not None)

"""The legends of figures of methods: who has which colour, and what shades and crosses mean. Needs matplotlib."""

from __future__ import annotations

from textwrap import wrap
from typing import TYPE_CHECKING, Any

from rewarded_lines.config import SFT
from rewarded_lines.drawing.labels import shorten
from rewarded_lines.drawing.planes import Drawn, sft_volumes, tint
from rewarded_lines.summaries.names import policy_points
from rewarded_lines.summaries.summary import Summary
from rewarded_lines.summaries.tables import interval_text, reference_text, volume_unit

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.legend import Legend

_OPTIONS: dict[str, Any] = dict(frameon=False, alignment="left", columnspacing=1.5)
# Characters of a method's name, and of a line of the title.
_LONGEST, _WRAPPED = 40, 70
_ABOVE = "outside upper left"


def draw_legend(figure: Figure, drawn: Drawn, volumes: bool, shaded: bool, corner: bool = False) -> None:
    """Put the legend above the panels in as many columns as fit, or into the free corner of a matrix if it fits there.

    Args:
        figure: with its panels.
        drawn: how the methods are drawn.
        volumes: whether each method's hypervolume stands beside its name, and its reference point in the title.
        shaded: whether areas are tinted.
        corner: whether the upper right corner is free.
    """
    handles, labels = _entries(drawn, volumes, shaded)
    title = hypervolume_title(drawn.summary) if volumes else None
    if corner:
        narrow = hypervolume_title(drawn.summary, lines=3) if volumes else None
        legend = figure.legend(handles, labels, title=narrow, loc="upper right", handler_map=_handlers(), **_OPTIONS)
        figure.draw_without_rendering()
        if not _collides(figure, legend):
            return
        legend.remove()
    for columns in (3, 2, 1):
        options = dict(loc=_ABOVE, ncols=columns, handler_map=_handlers(), **_OPTIONS)
        legend = figure.legend(handles, labels, title=title, **options)
        if columns == 1 or legend.get_window_extent().width <= figure.bbox.width:
            return
        legend.remove()


def hypervolume_title(summary: Summary, lines: int = 2) -> str:
    """Return what the numbers in the legend are: hypervolume, its unit, its reference point; on 2 or 3 lines."""
    at = reference_text(summary, SFT).replace("-", "\N{MINUS SIGN}")
    what = f"Hypervolume above SFT{' ' if lines == 2 else chr(10)}[{volume_unit(summary)}]"
    # The names of rewards without a unit may be long.
    whole = f"{what} and its {summary.level:.0%} interval\nreference point: {at}"
    return "\n".join(part for line in whole.splitlines() for part in wrap(line, _WRAPPED))


def _entries(drawn: Drawn, volumes: bool, shaded: bool) -> tuple[list[Any], list[str]]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = []
    labels: list[str] = []
    numbers = sft_volumes(drawn.summary) if volumes else {}
    for name in drawn.methods:
        line = Line2D([], [], **drawn.line(name))
        tinted = shaded and name in drawn.chosen
        handles.append((Patch(facecolor=tint(drawn.looks[name]), linewidth=0), line) if tinted else line)
        number = f": {interval_text(numbers[name])}".replace("-", "\N{MINUS SIGN}") if name in numbers else ""
        labels.append(shorten(drawn.labels[name], _LONGEST) + number)
    if policy_points(drawn.summary):
        handles.append(Line2D([], [], **drawn.mark("policy")))
        labels.append("policy, not merged")
    handles.append(Line2D([], [], **drawn.mark("interval")))
    labels.append(f"{drawn.summary.level:.0%} interval of a mean")
    if len(drawn.summary.policies) == 2 and any(point.lam is not None for point in drawn.summary.points):
        handles.append(Line2D([], [], linestyle="none"))
        labels.append(f"λ: weight of {shorten(drawn.summary.policies[0], _LONGEST)}")
    return handles, labels


def _handlers() -> dict[Any, Any]:
    from matplotlib.legend_handler import HandlerTuple

    return {tuple: HandlerTuple(pad=0)}


def _collides(figure: Figure, legend: Legend) -> bool:
    box = legend.get_window_extent()
    inside = box.x0 >= 0 and box.y0 >= 0
    panels = [axes.get_tightbbox() for axes in figure.axes]
    return not inside or any(panel is not None and box.overlaps(panel) for panel in panels)

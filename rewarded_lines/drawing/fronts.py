"""The figure of a front: every method's points along λ, in the planes of the rewards. Needs matplotlib."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rewarded_lines.drawing.legends import draw_legend
from rewarded_lines.drawing.planes import FEW, KL, Drawn, Plane, axis_label, draw_plane, freeze, prepare
from rewarded_lines.drawing.style import PAPER, PLANE, WIDE, blank_figure, house_style
from rewarded_lines.summaries.names import merged_methods
from rewarded_lines.summaries.summary import Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Of markers and lines in the panels of a matrix.
_SMALL = 0.75
# The least side of such a panel, in inches.
_PANEL = 2.0


def front_figure(summary: Summary, style: str = PAPER) -> Figure:
    """Draw the fronts of a run.

    Two rewards make one plane, more make a matrix with a plane for each pair; a single reward is drawn over KL to SFT.
    Points are mean scores, joined in the order of λ when two policies were merged; crosses are the intervals
    of some of them. Shaded: what a method's nondominated points dominate above the SFT model, whose area is
    the hypervolume in the legend. Of more than four methods the first and the best are shaded and have their λ written.

    Args:
        summary: the numbers.
        style: see `house_style`.

    Raises:
        UserError: matplotlib is not installed, or there is no such style.
    """
    with house_style(style):
        return _matrix(summary) if len(summary.objectives) > 2 else _one_plane(summary)


def _one_plane(summary: Summary) -> Figure:
    names = list(summary.objectives)
    plane = (names[0], names[1]) if len(names) == 2 else (KL, names[0])
    drawn = prepare(summary)
    many = len(merged_methods(summary)) > FEW
    # The legend of many methods needs two columns, and the plane more room.
    figure = blank_figure(WIDE, 6.2) if many else blank_figure(PLANE, PLANE)
    axes = figure.add_subplot()
    axes.set(xlabel=axis_label(plane[0], summary), ylabel=axis_label(plane[1], summary))
    draw_plane(axes, drawn, plane, shade=len(names) == 2)
    draw_legend(figure, drawn, volumes=True, shaded=len(names) == 2)
    freeze(figure, [(axes, plane)], drawn)
    return figure


def _matrix(summary: Summary) -> Figure:
    """Draw the plane of each pair of rewards: those in a column share their x axis, those in a row their y axis."""
    names = list(summary.objectives)
    side = len(names) - 1
    drawn = prepare(summary, _SMALL)
    width = max(WIDE, _PANEL * side)
    figure = blank_figure(width, width)
    grid = figure.add_gridspec(side, side)
    panels: dict[tuple[int, int], Axes] = {}
    for row in range(side):
        for column in range(row + 1):
            # The first of a column and of a row are there before the others of it.
            above = panels.get((column, column)) if row > column else None
            panels[row, column] = figure.add_subplot(
                grid[row, column], sharex=above, sharey=panels.get((row, 0)) if column else None
            )
    planes = []
    for (row, column), axes in panels.items():
        plane = (names[column], names[row + 1])
        _draw_panel(axes, drawn, plane, row == side - 1, column == 0)
        planes.append((axes, plane))
    draw_legend(figure, drawn, volumes=True, shaded=False, corner=True)
    freeze(figure, planes, drawn)
    return figure


def _draw_panel(axes: Axes, drawn: Drawn, plane: Plane, bottom: bool, left: bool) -> None:
    """Draw a panel of the matrix; only those at its bottom and its left have labels and numbers at their axes."""
    draw_plane(axes, drawn, plane)
    axes.tick_params(labelbottom=bottom, labelleft=left)
    if bottom:
        axes.set_xlabel(axis_label(plane[0], drawn.summary, lines=2))
    if left:
        axes.set_ylabel(axis_label(plane[1], drawn.summary, lines=2))

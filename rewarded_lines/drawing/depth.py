"""The figure of a checkpoint by depth: LiNeS scale and residual norm of every block. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rewarded_lines.drawing.labels import shorten
from rewarded_lines.drawing.style import FORMATS, blank_figure, figure_bytes, house_style, looks
from rewarded_lines.errors import did_you_mean, fail
from rewarded_lines.folders import write_bytes
from rewarded_lines.inspecting.inspect import Inspection, Level

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Blue before orange: most models have one list of blocks, and blue is the darker of the two in grey.
_ORDER = (1, 0, 2, 3, 4, 5)
_LINE: dict[str, Any] = dict(linewidth=1.5, markersize=5, markeredgewidth=1.0)
# Before the schedule: hollow and dashed, so that the two differ in grey too.
_BEFORE: dict[str, Any] = dict(linestyle=(0, (4, 2)), markerfacecolor="white", linewidth=1.2)
SCALE_AXIS, NORM_AXIS = "scale s of the residual [×]", "L2 norm [units of the weights]"
_TITLE: dict[str, Any] = dict(loc="left")
_MARKED = 16
_LONGEST = 18

# A list of blocks: its name, its levels, how its line looks.
List = tuple[str, Sequence[Level], dict[str, Any]]


def check_figure_file(file: str | Path) -> str:
    """Return the format of a figure's file, before any work is done for it.

    Raises:
        UserError: its name ends on no known format, its folder is not there, or matplotlib is not installed.
    """
    path = Path(file)
    kind = path.suffix.removeprefix(".").lower()
    if kind not in FORMATS:
        raise fail(
            "no format of a figure",
            where=str(file),
            expected="a file name ending on .png, .svg or .pdf",
            got=path.suffix or "no ending",
            remedy=did_you_mean(kind, FORMATS),
        )
    if path.is_dir() or not path.parent.is_dir():
        what = "is a folder" if path.is_dir() else "its folder is not there"
        raise fail(what, where=str(file), expected="a file in a folder that exists")
    with house_style():
        return kind


def write_depth_figure(inspection: Inspection, file: str | Path) -> None:
    """Draw a checkpoint by depth into a .png, .svg or .pdf file, which is replaced whole.

    Raises:
        UserError: see `check_figure_file`.
    """
    path, kind = Path(file), check_figure_file(file)
    write_bytes(path, figure_bytes(depth_figure(inspection), kind))


def depth_figure(inspection: Inspection) -> Figure:
    """Draw the LiNeS scale over depth and, where there is a base, each block's residual norm before and after scaling.

    One line for each list of blocks. What lies outside the blocks has no depth and is not drawn.

    Raises:
        UserError: matplotlib is not installed.
    """
    with house_style():
        panels = 1 if inspection.base is None else 2
        figure = blank_figure(3.5 * panels, 3.0)
        figure.set_layout_engine("constrained", w_pad=0.08)
        axes = figure.subplots(1, panels, squeeze=False)[0]
        lists = _lists(inspection)
        _draw_scales(axes[0], inspection, lists)
        if panels == 2:
            _draw_norms(axes[1], inspection, lists)
        for one in axes:
            finish_depth(one)
        _draw_legends(figure, lists, panels)
    return figure


def _draw_scales(axes: Axes, inspection: Inspection, lists: Sequence[List]) -> None:
    for _, levels, look in lists:
        axes.plot(blocks_of(levels), [level.scale for level in levels], **look)
    schedule = f"LiNeS, α = {inspection.alpha:g}, β = {inspection.beta:g}"
    axes.set_title(schedule.replace("-", "\N{MINUS SIGN}"), **_TITLE)
    axes.set_ylabel(SCALE_AXIS)


def _draw_norms(axes: Axes, inspection: Inspection, lists: Sequence[List]) -> None:
    for _, levels, look in lists:
        blocks = blocks_of(levels)
        residuals = [level.residual for level in levels]
        axes.plot(blocks, [one.norm if one else 0.0 for one in residuals], **(look | _BEFORE))
        axes.plot(blocks, [one.scaled_norm if one else 0.0 for one in residuals], **look)
    names = [shorten(Path(str(path)).name, _LONGEST) for path in (inspection.checkpoint, inspection.base)]
    axes.set_title(f"residual τ of {names[0]} over {names[1]}", **_TITLE)
    axes.set_ylabel(NORM_AXIS)


def _draw_legends(figure: Figure, lists: Sequence[List], panels: int) -> None:
    """Say above the panels which list has which colour and marker, and how before and after scaling differ."""
    from matplotlib.lines import Line2D

    several = len(lists) > 1
    if several:
        stacks = [Line2D([], [], label=stack, **look) for stack, _, look in lists]
        figure.legend(handles=stacks, loc="outside upper left", frameon=False)
    if panels == 2:
        look = _LINE | dict(color="0.35", marker="o") if several else lists[0][2]
        kinds = [
            Line2D([], [], label="‖τ‖, before scaling", **(look | _BEFORE)),
            Line2D([], [], label="‖s·τ‖, scaled", **look),
        ]
        figure.legend(handles=kinds, loc="outside upper right", ncols=1 if several else 2, frameon=False)


def _lists(inspection: Inspection) -> list[List]:
    """Return every list of blocks with its blocks' levels, and how its line looks."""
    found: list[List] = []
    palette = looks(len(_ORDER))
    for stack, index in zip(inspection.stacks, cycle(_ORDER), strict=False):
        levels = [level for level in inspection.levels if level.stack == stack and level.block is not None]
        one = palette[index]
        look = dict(color=one.colour, marker=one.marker, linestyle=one.line, markevery=-(-len(levels) // _MARKED))
        found.append((stack, levels, _LINE | look))
    return found


def blocks_of(levels: Sequence[Level]) -> list[int]:
    """Return the blocks of levels, counted from 0; what lies outside the blocks has none."""
    return [level.block for level in levels if level.block is not None]


def finish_depth(axes: Axes) -> None:
    """Give a panel over depth its grid and its axes: whole blocks below, heights from zero."""
    from matplotlib.ticker import MaxNLocator

    axes.grid(True)
    axes.set_xlabel("block [index from 0]")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    low, high = axes.get_ylim()
    # From zero, so that heights can be compared; a little room above, where a constant would touch the frame.
    axes.set_ylim(min(low, 0.0) if low < 0 else 0.0, 1.04 * high if high > 0 else 1.0)

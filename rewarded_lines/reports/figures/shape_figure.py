"""The figure of `search --shape`. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rewarded_lines.folders import write_bytes
from rewarded_lines.merger.lines_schedule import lines_scale
from rewarded_lines.reports.figures.figure_style import WIDE, blank_figure, figure_bytes, house_style, looks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from rewarded_lines.evaluator.shape_search import FoundShape


def write_shape_figure(found: FoundShape) -> Path:
    """Write `shape_figure` as PNG beside the file of the trials, and return its path."""
    path = Path(found.file).with_suffix(".png")
    with house_style():
        write_bytes(path, figure_bytes(shape_figure(found), "png"))
    return path


def shape_figure(found: FoundShape) -> Figure:
    """Draw the found scales by block beside LiNeS and the tuned α and β, and the differences on the test prompts."""
    from matplotlib.ticker import MaxNLocator

    figure = blank_figure(WIDE, 3.2)
    depth, change = figure.subplots(1, 2)
    blocks = len(next(iter(found.scales.values())))
    lines = {"LiNeS": (1.0, 1.0), "tuned α, β": found.tuned}
    curves = {f"shape, {name}" if name != "all" else "shape": row for name, row in found.scales.items()}
    curves |= {name: [lines_scale(block, blocks, *one) for block in range(blocks)] for name, one in lines.items()}
    for (name, row), look in zip(curves.items(), looks(len(curves)), strict=True):
        depth.plot(range(blocks), row, label=name, **look.keywords())
    depth.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    depth.set(xlabel="block [index from 0]", ylabel="scale s of the residual [×]", ylim=(0, None))
    depth.legend(frameon=False)
    for height, one in enumerate(found.differences):
        value, low, high = one.difference.value, one.difference.low, one.difference.high
        change.errorbar([value], [height], xerr=[[value - low], [high - value]], fmt="o", capsize=3, color="0.2")
    change.xaxis.set_major_locator(MaxNLocator(nbins=4))
    change.axvline(0, color="0.5", linewidth=0.8)
    change.set_yticks(range(len(found.differences)), [f"shape − {one.other}" for one in found.differences])
    change.set(xlabel="hypervolume, 95% interval", ylim=(-0.6, len(found.differences) - 0.4))
    change.invert_yaxis()
    return figure

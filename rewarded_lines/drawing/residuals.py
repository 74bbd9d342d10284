"""A run by depth: the scale that each method gives a block, and how far each policy's block lies from SFT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rewarded_lines.drawing.depth import NORM_AXIS, SCALE_AXIS, blocks_of, finish_depth
from rewarded_lines.drawing.labels import shorten
from rewarded_lines.drawing.style import PAPER, WIDE, Look, blank_figure, house_style, looks
from rewarded_lines.inspecting.inspect import Inspection
from rewarded_lines.rules.lines import lines_scale
from rewarded_lines.summaries.names import merged_methods
from rewarded_lines.summaries.summary import PointSummary, Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARKED = 16
# Policies have looks of their own: the first ones are the methods'.
_SKIPPED = 4
# α from, α to, β.
Schedule = tuple[float, float, float, bool]


def run_depth_figure(summary: Summary, inspections: Mapping[str, Inspection], style: str = PAPER) -> Figure:
    """Draw the scale of every method by block, and the norm of every policy's residual by block.

    Methods of one schedule share a line; a band where α differs between points. What lies outside the blocks has no
    depth and is not drawn.

    Args:
        summary: the numbers, for the methods.
        inspections: of every policy, against the SFT model.
        style: see `house_style`.

    Raises:
        UserError: matplotlib is not installed, or there is no such style.
    """
    with house_style(style):
        figure = blank_figure(WIDE, 3.6)
        scales, norms = figure.subplots(1, 2)
        first = next(iter(inspections.values()))
        _draw_scales(scales, summary, max(first.stacks.values()))
        _draw_norms(norms, inspections)
        for axes in (scales, norms):
            finish_depth(axes)
            # Above, where it covers no line.
            axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), frameon=False, borderaxespad=0.2)
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
    return figure


def schedules(summary: Summary) -> dict[Schedule, list[str]]:
    """Return the methods of every LiNeS schedule; models that are not merged have none."""
    found: dict[Schedule, list[str]] = {}
    for name, points in merged_methods(summary).items():
        if not any(point.checkpoint for point in points):
            found.setdefault(_schedule(points), []).append(name)
    return found


def _schedule(points: Sequence[PointSummary]) -> Schedule:
    alphas = [point.merge.alpha for point in points]
    return min(alphas), max(alphas), points[0].merge.beta, any(point.edit for point in points)


def _draw_scales(axes: Axes, summary: Summary, blocks: int) -> None:
    depth = range(blocks)
    found = schedules(summary)
    for ((low, high, beta, edit), names), look in zip(found.items(), looks(len(found)), strict=True):
        ends = [(alpha, 1 - alpha if edit else beta) for alpha in (low, high)]
        least, most = ([lines_scale(block, blocks, *end) for block in depth] for end in ends)
        alpha = f"{low:g}" if low == high else f"{low:.2f} to {high:.2f}"
        schedule = f"α = {alpha}, β = {'1 - α' if edit else f'{beta:g}'}".replace("-", "\N{MINUS SIGN}")
        middle = [(one + other) / 2 for one, other in zip(least, most, strict=True)]
        axes.fill_between(depth, least, most, color=look.colour, alpha=0.25, linewidth=0)
        axes.plot(depth, middle, label=f"{shorten(', '.join(names), 36)}: {schedule}", **_line(look, blocks))
    axes.set_ylabel(SCALE_AXIS)


def _draw_norms(axes: Axes, inspections: Mapping[str, Inspection]) -> None:
    palette = looks(_SKIPPED + sum(len(one.stacks) for one in inspections.values()))[_SKIPPED:]
    lines = [(policy, one, stack) for policy, one in inspections.items() for stack in one.stacks]
    for (policy, one, stack), look in zip(lines, palette, strict=True):
        levels = [level for level in one.levels if level.stack == stack and level.block is not None]
        norms = [level.residual.norm if level.residual else 0.0 for level in levels]
        label = f"residual τ of {shorten(policy, 24)}" + (f", {stack}" if len(one.stacks) > 1 else "")
        axes.plot(blocks_of(levels), norms, label=label, **_line(look, len(levels)))
    axes.set_ylabel(NORM_AXIS)


def _line(look: Look, blocks: int) -> dict[str, Any]:
    return dict(
        color=look.colour,
        marker=look.marker,
        linestyle=look.line,
        markeredgecolor="white",
        markeredgewidth=0.5,
        markevery=-(-blocks // _MARKED),
    )

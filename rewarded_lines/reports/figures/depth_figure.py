"""Figures over depth: LiNeS scales, residual norms, and what several policies share. Need matplotlib."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rewarded_lines.merger.compare_policies import RANKS, Comparison
from rewarded_lines.merger.inspect import Inspection, Level
from rewarded_lines.merger.lines_schedule import Line, Schedule, lines_scale
from rewarded_lines.merger.methods import MOD
from rewarded_lines.reports.comparison_tables import AGREEMENT, COSINE, OVERLAP, spread
from rewarded_lines.reports.figures.figure_style import WIDE, blank_figure, legend_above, looks, number_blocks, settled
from rewarded_lines.reports.figures.label_placement import shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from rewarded_lines.evaluator.shape_search import FoundShape
    from rewarded_lines.reports.summary import Summary

# Blue first: most models have one list of blocks, and blue is darker in grey.
_ORDER = (1, 0, 2, 3, 4, 5)
_LINE: dict[str, Any] = dict(linewidth=1.5, markersize=5, markeredgecolor="auto", markeredgewidth=1.0)
# Unscaled lines are hollow and dashed, so that they also differ in grey.
_BEFORE: dict[str, Any] = dict(linestyle=(0, (4, 2)), markerfacecolor="white", linewidth=1.2)
# At most this many markers on a line and characters of a folder's name.
_MARKED, _LONGEST = 16, 18
# Policies skip the first looks, which the methods have.
_SKIPPED = 4
_SCALE = "scale s of the residual [×]"
_BETWEEN_PAIRS = {"cosine": COSINE, "overlap": OVERLAP, "same sign": AGREEMENT}
Band = tuple[Schedule, Schedule]
"""The schedules of a method with the least and the greatest α; equal ones where α does not change with λ."""


def depth_figure(inspection: Inspection) -> Figure:
    """Draw the scale by block and, with a base, the residual norm before and after scaling.

    Each list of blocks has a line; the scale has one for each policy that the user named, and for each kind of module
    with a factor. Tensors outside the blocks are not drawn.
    """
    panels = 1 if inspection.base is None else 2
    styles, scales = _styles(inspection), _scales(inspection)
    # Room for a long legend.
    figure = blank_figure(3.5 * panels, 3.0 + 0.2 * max(0, len(scales) - 3))
    figure.set_layout_engine("constrained", w_pad=0.08)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    drawn = {label: look.keywords(**_LINE) for label, look in zip(scales, looks(len(scales)), strict=True)}
    drawn = dict(zip(scales, styles.values(), strict=True)) if len(scales) == len(styles) else drawn
    for label, look in drawn.items():
        depth = range(len(scales[label]))
        axes[0].plot(depth, scales[label], **(look | {"markevery": _every(depth)}))
    for stack, look in styles.items() if panels == 2 else ():
        blocks, levels = _blocks(inspection, stack)
        axes[1].plot(blocks, _norms(levels), **(look | _BEFORE))
        axes[1].plot(blocks, _norms(levels, scaled=True), **look)
    text = inspection.schedule.text()
    schedule = text if inspection.schedule.forms else f"LiNeS, {text}"
    schedule = "schedules of the policies" if len(inspection.schedules) > 1 else schedule
    names = [shorten(Path(str(path)).name, _LONGEST) for path in (inspection.checkpoint, inspection.base)]
    titles = [schedule.replace("-", "\N{MINUS SIGN}"), f"residual τ of {names[0]} over {names[1]}"]
    for one, title in zip(axes, titles, strict=False):
        one.set_title(title, loc="left")
    _finish(axes)
    several = len(drawn) > 1
    if several:
        legend_above(figure, drawn.items(), columns=1)
    if panels == 2:
        look = _LINE | dict(color="0.35", marker="o") if several else next(iter(styles.values()))
        kinds = {"‖τ‖, before scaling": look | _BEFORE, "‖s·τ‖, scaled": look}
        legend_above(figure, kinds.items(), columns=1 if several else 2, side="right")
    return figure


def _scales(inspection: Inspection) -> dict[str, list[float]]:
    """Return the scales by block of every line, by its label."""
    schedules = inspection.schedules or {"": inspection.schedule}
    found = {}
    for policy, schedule in schedules.items():
        factors = {**dict(schedule.modules), "other kinds": 1.0} if schedule.modules else {"": 1.0}
        for stack, scales in schedule.by_block(inspection.stacks).items():
            for kind, factor in factors.items():
                parts = (policy if len(schedules) > 1 else "", stack if len(inspection.stacks) > 1 else "", kind)
                label = ", ".join(shorten(part, 24) for part in parts if part)
                found[label or stack] = [factor * scale for scale in scales]
    return found


def run_depth_figure(summary: Summary, inspections: Mapping[str, Inspection]) -> Figure:
    """Draw the scale of every method and the residual norm of every policy by block.

    Methods with equal schedules share a line, with a band where α differs between points.
    The inspections compare each policy with SFT; tensors outside the blocks are not drawn.
    """
    figure = blank_figure(WIDE, 3.6)
    scales, norms = figure.subplots(1, 2)
    _draw_scales(scales, summary, max(next(iter(inspections.values())).stacks.values()))
    _draw_norms(norms, inspections)
    _finish([scales, norms])
    for axes in (scales, norms):
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), frameon=False, borderaxespad=0.2)
    return settled(figure)


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
    number_blocks(depth, _SCALE)
    depth.set_ylim(0, None)
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


def comparison_figure(found: Comparison) -> Figure:
    """Draw cosine, overlap and agreement of signs by block, the mean over pairs, and ‖τ‖² held at each rank.

    The blocks of several lists follow one another. What lies outside the blocks is not drawn.
    """
    figure = blank_figure(WIDE, 3.4)
    shared, ranks = figure.subplots(1, 2)
    _draw_shared(shared, found)
    _draw_ranks(ranks, found)
    for axes in (shared, ranks):
        axes.grid(True)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), frameon=False, borderaxespad=0.2, ncols=3)
    return settled(figure)


def _draw_shared(axes: Axes, found: Comparison) -> None:
    blocks = [one for (_, block, _), one in found.levels.items() if block is not None]
    for (label, measure), look in zip(_BETWEEN_PAIRS.items(), looks(len(_BETWEEN_PAIRS)), strict=True):
        pairs = [spread(one, measure) for one in blocks]
        means = [math.fsum(one) / len(one) if one else math.nan for one in pairs]
        axes.plot(range(len(means)), means, label=label, **look.keywords(markevery=max(1, len(means) // 16)))
    number_blocks(axes, "mean over pairs of policies [1]")
    axes.set_ylim(min(-0.05, axes.get_ylim()[0]), 1.05)


def _draw_ranks(axes: Axes, found: Comparison) -> None:
    held = found.spectra[""].held if found.spectra else {}
    for (name, shares), look in zip(held.items(), looks(len(held)), strict=True):
        drawn = [math.nan if share is None else 100 * share for share in shares]
        axes.plot(RANKS, drawn, label=shorten(name, 18), **look.keywords())
    axes.set_xscale("log", base=2)
    axes.set_xticks(RANKS, [str(rank) for rank in RANKS])
    axes.set(xlabel="rank k [singular values]", ylabel="share of ‖τ‖² in the first k [%]", ylim=(0, 105))


def schedules(summary: Summary) -> dict[Band, list[str]]:
    """Return the methods of every schedule, without models that are not merged."""
    found: dict[Band, list[str]] = {}
    for name, points in summary.merged_methods().items():
        if not any(point.checkpoint or point.merge.method == MOD for point in points):
            merges = sorted((point.merge for point in points), key=lambda merge: merge.alpha)
            found.setdefault((merges[0].schedule, merges[-1].schedule), []).append(name)
    return found


def _draw_scales(axes: Axes, summary: Summary, blocks: int) -> None:
    """Draw a line for each schedule, and for each policy with one of its own; factors by kind are only named."""
    found, depth = schedules(summary), range(blocks)
    shown = [(band, names, policy) for band, names in found.items() for policy in range(len(band[0].lines))]
    for ((low, high), names, policy), look in zip(shown, looks(len(shown)), strict=True):
        ends = [one.line(policy) for one in (low, high)]
        least, most = ([line.at(block, blocks) for block in depth] for line in ends)
        text = _band_text(*ends) + "".join(f", {kind} × {factor:g}" for kind, factor in low.modules)
        text = f"{summary.policies[policy]}, {text}" if len(low.lines) > 1 else text
        middle = [(one + other) / 2 for one, other in zip(least, most, strict=True)]
        label = f"{shorten(', '.join(names), 36)}: {text}".replace("-", "\N{MINUS SIGN}")
        axes.fill_between(depth, least, most, color=look.colour, alpha=0.25, linewidth=0)
        axes.plot(depth, middle, label=label, **look.keywords(markevery=_every(depth)))


def _band_text(low: Line, high: Line) -> str:
    """Return α and β; α from least to most, and β as 1 − α where a single policy is edited."""
    if low == high:
        return low.text()
    beta = f"{low.beta:g}" if low.beta == high.beta else "1 - α"
    return f"α = {low.alpha:.2f} to {high.alpha:.2f}, β = {beta}"


def _draw_norms(axes: Axes, inspections: Mapping[str, Inspection]) -> None:
    lines = [(policy, one, stack) for policy, one in inspections.items() for stack in one.stacks]
    for (policy, one, stack), look in zip(lines, looks(_SKIPPED + len(lines))[_SKIPPED:], strict=True):
        blocks, levels = _blocks(one, stack)
        label = f"residual τ of {shorten(policy, 24)}" + (f", {stack}" if len(one.stacks) > 1 else "")
        axes.plot(blocks, _norms(levels), label=label, **look.keywords(markevery=_every(blocks)))


def _styles(inspection: Inspection) -> dict[str, dict[str, Any]]:
    palette = looks(len(_ORDER))
    return {
        stack: palette[index].keywords(markevery=_every(_blocks(inspection, stack)[0]), **_LINE)
        for stack, index in zip(inspection.stacks, cycle(_ORDER), strict=False)
    }


def _every(blocks: Sequence[int]) -> int:
    """Return the step between the blocks with a marker."""
    return -(-len(blocks) // _MARKED)


def _blocks(inspection: Inspection, stack: str) -> tuple[list[int], list[Level]]:
    """Return the block numbers of a list, from 0, and their levels."""
    found = {one.block: one for one in inspection.levels if one.stack == stack and one.block is not None}
    return list(found), list(found.values())


def _norms(levels: Sequence[Level], scaled: bool = False) -> list[float]:
    residuals = [level.residual for level in levels]
    return [0.0 if one is None else one.scaled_norm if scaled else one.norm for one in residuals]


def _finish(panels: Sequence[Axes]) -> None:
    for axes, label in zip(panels, (_SCALE, "L2 norm [units of the weights]"), strict=False):
        axes.grid(True)
        number_blocks(axes, label)
        low, high = axes.get_ylim()
        # Heights start at zero; the room above keeps a constant line off the frame.
        axes.set_ylim(min(low, 0.0) if low < 0 else 0.0, 1.04 * high if high > 0 else 1.0)

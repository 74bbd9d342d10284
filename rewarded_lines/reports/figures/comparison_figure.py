"""The figure of several policies: what they share by block, and the rank of what each changed. Needs matplotlib."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from rewarded_lines.merger.compare_policies import RANKS, Comparison
from rewarded_lines.reports.comparison_texts import AGREEMENT, COSINE, OVERLAP, spread
from rewarded_lines.reports.figures.figure_style import WIDE, blank_figure, looks, number_blocks, settled
from rewarded_lines.reports.figures.label_placement import shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SHARED = {"cosine": COSINE, "overlap": OVERLAP, "same sign": AGREEMENT}


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
    for (label, measure), look in zip(_SHARED.items(), looks(len(_SHARED)), strict=True):
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

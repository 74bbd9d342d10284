"""A comparison of policies as tables for the terminal and as data for JSON."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any

from rich.console import RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from rewarded_lines.errors import printable
from rewarded_lines.kernels.distances import Distance
from rewarded_lines.merger.compare_policies import RANKS, Comparison
from rewarded_lines.reports.comparison_texts import AGREEMENT, COSINE, OVERLAP, implications, number, percent, spread

_BETWEEN = ("overlap", "same sign", "cosine")


def comparison_dict(found: Comparison, tensors: bool) -> dict[str, Any]:
    """Return a comparison for JSON: null for what does not exist; `tensors` keeps single tensors."""
    names = list(found.policies)
    levels = [
        {"stack": stack, "block": block, "side": side, **_distance(one, names)}
        for (stack, block, side), one in found.levels.items()
    ]
    single = {"tensors": {name: _distance(one, names) for name, one in found.tensors.items()}} if tensors else {}
    return {
        **{"base": found.base, "policies": dict(found.policies), "stacks": dict(found.stacks)},
        **{"total": _distance(found.total, names), "levels": levels, **single},
        **{"ranks": RANKS, "spectra": {kind or "all": vars(one) for kind, one in found.spectra.items()}},
        **{"measured": list(found.measured), "matrices": found.matrices},
        **{"implications": implications(found), "notes": list(found.notes)},
    }


def comparison_tables(found: Comparison, tensors: bool) -> Iterator[RenderableType]:
    """Yield a heading, the tables by policy, pair, depth and kind of matrix, the paragraph, and notes."""
    names, total = list(map(printable, found.policies)), found.total
    rows: list[tuple[str, ...]]
    yield Text(
        printable(
            f"{found.base} and {len(names)} policies of it: {total.values:,} values in {len(found.tensors)} tensors"
        )
    )
    rows = [
        (name, percent([total.share(i)]), percent([total.unique(i)]), *_norms(total, i)) for i, name in enumerate(names)
    ]
    yield _table(("policy", "changed", "only by it", "‖τ‖", "‖τ‖/‖θ‖"), rows)
    if len(names) > 2:
        pairs = combinations(range(len(names)), 2)
        rows = [(f"{names[i]}, {names[j]}", *_between(total, [(i, j)])) for i, j in pairs]
        yield _table(("pair", *_BETWEEN), rows)
    everyone = range(len(names))
    for stack in found.stacks:
        rows = []
        for (mine, block, side), one in found.levels.items():
            if mine == stack:
                shares = percent(sorted(one.share(i) or 0.0 for i in everyone))
                rows.append((side if block is None else str(block), shares, *_between(one)))
        yield _table((printable(stack), "changed", *_BETWEEN), rows)
    if tensors:
        rows = [
            (printable(name), percent(sorted(one.share(i) or 0.0 for i in everyone)), *_between(one))
            for name, one in found.tensors.items()
        ]
        yield _table(("tensor", "changed", *_BETWEEN), rows)
    yield from _ranks(found)
    yield Text("\n" + printable(implications(found)))
    yield Text("\n" + "\n".join(map(printable, [*_LEGEND, *found.notes])), style="dim")


_LEGEND = (
    "changed: share of the values that differ from the base's; only by it: share of these that no other policy changed",
    "overlap: changed by both, of those that either changed; same sign: of those that both changed",
    "k: share of ‖τ‖² in the k largest singular values; stable rank: the median of ‖τ‖²/σ₁²",
)


def _ranks(found: Comparison) -> Iterator[RenderableType]:
    if not found.spectra:
        yield Text(
            f"\nno singular values: none of {found.matrices} matrices was measured (--spectra all measures each)"
        )
        return
    rows = []
    for kind, one in found.spectra.items():
        for name, shares in one.held.items():
            stable = one.stable_rank[name]
            cells = (*(percent([share]) for share in shares), "–" if stable is None else f"{stable:.1f}")
            rows.append((printable(kind or "all"), str(one.matrices), printable(name), *cells))
    yield _table(("matrices", "count", "policy", *(f"k={rank}" for rank in RANKS), "stable rank"), rows)
    if len(found.measured) < found.matrices:
        count = f"{len(found.measured)} of {found.matrices} matrices"
        yield Text(f"{count}, in blocks evenly spaced over depth; --spectra all measures each", style="dim")


def _between(one: Distance, pairs: Sequence[tuple[int, int]] = ()) -> tuple[str, str, str]:
    """Return overlap, agreement and cosine of one pair, or the ends of their spread over all pairs."""
    if pairs:
        found = [[value for pair in pairs if (value := measure(one, *pair)) is not None] for measure in _MEASURES]
    else:
        found = [spread(one, measure) for measure in _MEASURES]
    return percent(found[0]), percent(found[1]), number(found[2])


_MEASURES = (OVERLAP, AGREEMENT, COSINE)


def _norms(total: Distance, i: int) -> tuple[str, str]:
    relative = total.norm(i) / math.sqrt(total.base) if total.base > 0 else math.nan
    return f"{total.norm(i):.4g}", f"{100 * relative:.3g}%" if math.isfinite(relative) else "–"


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Padding:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for index, heading in enumerate(headings):
        table.add_column(Text(heading), justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    # A line between tables.
    return Padding(table, (1, 0, 0, 0))


def _distance(one: Distance, names: Sequence[str]) -> dict[str, Any]:
    """Return the measures of a distance by their names."""
    own = {
        name: {
            **{"changed": int(one.both[i, i]), "share_changed": one.share(i), "only": int(one.alone[i])},
            "norm": _finite(one.norm(i)),
        }
        for i, name in enumerate(names)
    }
    pairs = [
        {
            **{"policies": [names[i], names[j]], "both": int(one.both[i, j]), "overlap": one.overlap(i, j)},
            **{"same_sign": one.agreement(i, j), "cosine": one.cosine(i, j)},
        }
        for i, j in combinations(range(len(names)), 2)
    ]
    counts = {"values": one.values, "changed": one.changed, "nonfinite": one.nonfinite}
    return {**counts, "base_norm": _finite(math.sqrt(one.base)), "policies": own, "pairs": pairs}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None

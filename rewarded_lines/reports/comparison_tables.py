"""A comparison of policies: tables for the terminal, data for JSON, and what it implies for the choice of a method."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from typing import Any

from rich.console import RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from rewarded_lines.errors import printable
from rewarded_lines.kernels.distances import Distance
from rewarded_lines.merger.compare_policies import RANKS, Comparison

Measure = Callable[[Distance, int, int], float | None]
OVERLAP, AGREEMENT, COSINE = Distance.overlap, Distance.agreement, Distance.cosine
# From here on a share counts as nearly all, and below it as few.
_NEARLY_ALL, _FEW = 0.9, 0.1
_ALIKE, _APART = 0.95, 0.1
_HELD, _LOST = 0.95, 0.8


def spread(distance: Distance, measure: Measure) -> list[float]:
    """Return a measure of every pair of policies that has it, from the lowest to the highest."""
    pairs = combinations(range(len(distance.alone)), 2)
    return sorted(value for pair in pairs if (value := measure(distance, *pair)) is not None)


def percent(values: Sequence[float | None]) -> str:
    """Return shares as a percentage, or as the lowest and highest; 0% only for 0, 100% only for 1, – for none."""
    known = [value for value in values if value is not None]
    return _ends([value if value in (0, 1) else min(max(value, 0.001), 0.999) for value in known], "{:.3g}%", 100)


def number(values: Sequence[float]) -> str:
    """Return numbers with two decimals, or the lowest and the highest."""
    # No negative zero.
    return _ends([round(value, 2) + 0.0 for value in values], "{:.2f}", 1)


def implications(found: Comparison) -> str:
    """Return the paragraph; a measure that does not exist, such as the cosine of a residual of zero, is left out."""
    return " ".join(
        [*_changes(found), *_overlap(found.total), *_signs(found.total), *_directions(found), *_held(found)]
    )


def _changes(found: Comparison) -> Iterator[str]:
    total = found.total
    shares = [total.share(i) or 0.0 for i in range(len(found.policies))]
    each = (f"{name} {percent([share])}" for name, share in zip(found.policies, shares, strict=True))
    yield f"Training changed a share of the values: {', '.join(each)}."
    if 0 < max(shares) < 0.5:
        yield (
            "The other values equal the base's bit for bit, as when 16 bits round small steps away: TIES with a "
            f"--density of {percent([max(shares)])} or more drops none of the changes."
        )


def _overlap(total: Distance) -> Iterator[str]:
    shares = spread(total, OVERLAP)
    if not shares:
        return
    yield f"Of the values that one of two policies changed, both changed {percent(shares)}."
    if shares[-1] < _FEW:
        yield "They share few: RAM averages almost nothing, and its result is nearly the sum of the residuals."
    elif shares[0] > _NEARLY_ALL:
        yield "They share nearly all: RAM has nothing to do beyond the average, since few changes are one policy's own."
    else:
        yield "So RAM, which averages shared changes and keeps the others whole, differs from both soup and sum."


def _signs(total: Distance) -> Iterator[str]:
    signs = spread(total, AGREEMENT)
    if not signs:
        return
    dropped = spread(total, lambda one, i, j: float((one.both[i, j] - one.agreeing[i, j]) / one.changed))
    yield f"Where both changed a value, {percent(signs)} of the signs agree (chance: 50%)."
    much = "little" if dropped[-1] < _FEW else "much"
    yield f"They are opposite in {percent(dropped)} of all changed values, so TIES and Consensus change {much}."


def _directions(found: Comparison) -> Iterator[str]:
    total, count = found.total, len(found.policies)
    cosines, norms = spread(total, COSINE), {name: total.norm(i) for i, name in enumerate(found.policies)}
    if not cosines:
        return
    shrunk = math.sqrt(max(0.0, float(total.products.sum()))) / sum(norms.values())
    yield f"The cosine of the residuals is {number(cosines)}."
    if total.nonfinite:
        return
    yield f"The uniform soup has {shrunk:.2f} times their mean norm."
    if cosines[0] > _ALIKE:
        yield "They point the same way: soup and sum are one line and differ in length only, so compare at equal norm."
    elif cosines[-1] < -_APART:
        yield "They oppose each other: a step towards one policy takes back a part of the other's."
    elif -_APART < cosines[0] and cosines[-1] < _APART:
        yield f"They are nearly orthogonal: the sum keeps the whole step of each policy, the soup 1/{count} of it."
    blocks = [spread(one, COSINE) for (_, block, _), one in found.levels.items() if block is not None]
    if means := [math.fsum(one) / len(one) for one in blocks if one]:
        yield f"By block the cosine is {number(sorted(means))}."
    longest, shortest = (pick(norms, key=lambda name: norms[name]) for pick in (max, min))
    if norms[longest] > 2 * norms[shortest] > 0:
        times = f"{norms[longest] / norms[shortest]:.1f} times"
        yield f"{longest} moved {times} as far as {shortest}: equal weights favour it."


def _held(found: Comparison) -> Iterator[str]:
    held = list(found.spectra[""].held.values()) if found.spectra else []
    held = [shares for shares in held if None not in shares]
    if not held:
        return
    each = (f"{percent(sorted(one))} at rank {rank}" for rank, one in zip(RANKS, zip(*held, strict=True), strict=True))
    yield f"Of ‖τ‖² in {len(found.measured)} of {found.matrices} matrices, a LoRA could hold {', '.join(each)}."
    least = min(shares[-1] or 0.0 for shares in held)
    if least >= _HELD:
        yield f"So `merge --as adapter --rank {RANKS[-1]}` loses little there."
    elif least < _LOST:
        yield "So the changes are of high rank: an adapter loses much of them, whole models keep it."


def _ends(values: Sequence[float], shown: str, factor: float) -> str:
    ends = dict.fromkeys(shown.format(factor * value) for value in values[:: max(1, len(values) - 1)])
    return " to ".join(ends) or "–"


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

"""Hypervolumes at equal KL: what each family of methods reaches within so many nats of the SFT model.

At equal KL the length of the step is free. So methods that differ only in the length of their residual are one family:
Rewarded Soups and `uniform`, or LiNeS with α = β = 0.5 and with α = β = 1.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from rewarded_lines.config import SFT
from rewarded_lines.errors import fail
from rewarded_lines.evaluator.paired_scores import Table
from rewarded_lines.evaluator.points import PointSpec
from rewarded_lines.merger.methods import MOD
from rewarded_lines.pareto.comparison import MethodVolume, VolumeDifference, compare, method_volumes, sample_volumes
from rewarded_lines.pareto.hypervolume import Array
from rewarded_lines.progress import SILENT, Progress

_DIGITS = 6


@dataclass(frozen=True)
class KlBudget:
    """The hypervolumes above SFT of points within `max_kl` nats, and their differences.

    `method` of each row is a family: the names of its methods, with commas between them. `beyond` names the families
    without a point within the limit: a shorter step of theirs would probably do better.
    """

    max_kl: float
    hypervolumes: list[MethodVolume]
    differences: list[VolumeDifference]
    beyond: list[str]


def kl_budgets(
    table: Table, budgets: Sequence[float], *, exact: bool = False, progress: Progress = SILENT
) -> list[KlBudget]:
    """Return the hypervolumes at each of `budgets`, in nats, in the order of the numbers.

    Points beyond are drawn back by lot, see `drawn_back`; so is each run and each resample for itself.

    Raises:
        UserError: a budget is no KL above 0.
    """
    _check(budgets, ",".join(map(str, budgets)))
    found, groups = [], families(table)
    kl, sft = table.samples.means[..., len(table.rewards)], table.scores[:, :, 0]
    measured = kl[0].mean(axis=0)
    for most in sorted(budgets):
        scores = drawn_back(table.scores, kl, sft, most)
        fronts = {name: scores[:, :, rows] for name, rows in groups.items()}
        volumes = sample_volumes(fronts, {SFT: sft}, table.samples.drawn, exact=exact, progress=progress)
        beyond = [name for name, rows in groups.items() if measured[rows].min() > most]
        found.append(KlBudget(most, method_volumes(volumes), compare(volumes), beyond))
    return found


def drawn_back(means: ArrayLike, kl: ArrayLike, sft: ArrayLike, most: float) -> Array:
    """Return mean scores of points with a KL of at most `most`, [..., points, rewards].

    A point with a larger KL answers a prompt with probability t, chosen by lot, and the SFT model answers it else:

        s(t) = s_SFT + t·(s − s_SFT),   KL(t) = t·KL,   t = min(1, most/KL)

    Both are exact means of what this lot answers, so every such point can be reached with the measured model alone. A
    merge with a shorter step may do better: near the SFT model its KL falls faster than its reward.

    Args:
        means: s, [..., points, rewards].
        kl: mean KL to the SFT model, [..., points], in nats; one that noise makes negative is below any limit.
        sft: s_SFT, [..., rewards].
        most: the largest KL in nats, above 0.
    """
    scores, far, start = (np.asarray(one, dtype=np.float64) for one in (means, kl, sft))
    share = np.divide(most, far, out=np.ones_like(far), where=far > most)[..., None]
    origin = start[..., None, :]
    # Points within the limit stay as they are, bit for bit.
    return np.where(share < 1, origin + share * (scores - origin), scores)


def families(table: Table) -> dict[str, list[int]]:
    """Return the rows of each family by the names of its methods."""
    names: dict[Hashable, list[str]] = {}
    methods = table.methods()
    for name, rows in methods.items():
        shapes = {_shape(point.spec) for row in rows for point in table.rows[row]}
        names.setdefault(shapes.pop() if len(shapes) == 1 else name, []).append(name)
    return {", ".join(group): [row for name in group for row in methods[name]] for group in names.values()}


def _shape(spec: PointSpec) -> Hashable:
    """Return what a point shares with those that differ from it in weights and length only; its method if none may."""
    merge = spec.merge
    if spec.checkpoint or spec.edit or merge.method == MOD:
        return spec.method
    lines = [line.blocks or (line.alpha, line.beta) for line in merge.schedule.lines]
    flat = all(len(set(line.blocks)) == 1 or (not line.blocks and line.beta == 0) for line in merge.schedule.lines)
    numbers = [line[:1] if flat else line for line in lines]
    largest = max(abs(number) for line in numbers for number in line)
    scaled = tuple(tuple(round(number / largest, _DIGITS) for number in line) for line in numbers) if largest else ()
    kinds = () if flat else tuple(bool(line.blocks) for line in merge.schedule.lines)
    return merge.method, tuple(sorted(merge.options.items())), merge.modules, kinds, scaled


def parse_budgets(text: str | None) -> tuple[float, ...]:
    """Return the numbers of `3,5,10`, none of None; a UserError for what is no KL above 0."""
    if text is None:
        return ()
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        found = (math.nan,)
    _check(found, text)
    return found


def _check(budgets: Sequence[float], got: str) -> None:
    if not all(0 < one < math.inf for one in budgets):
        raise fail("not a limit of KL", where="--max-kl", expected="nats above 0, such as 3,5,10", got=got)

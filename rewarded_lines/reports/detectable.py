"""How small a difference between two methods a run could find, and what a difference of a given size needs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from rewarded_lines.config import SFT
from rewarded_lines.errors import fail
from rewarded_lines.evaluator.paired_scores import Table
from rewarded_lines.evaluator.records import Run
from rewarded_lines.pareto.bootstrap import Estimate, estimate_samples, run_average
from rewarded_lines.pareto.comparison import Volumes
from rewarded_lines.pareto.power import Variances, least_difference, prompts_needed, runs_needed, variances

Size = Callable[[float, float], float]
"""The hypervolume difference to plan for, from the one that was seen and the other method's hypervolume."""


@dataclass(frozen=True)
class Detectable:
    """What a run could find of the difference `method` − `other`.

    Attributes:
        measure: "hypervolume", or the reward whose means are compared.
        at: the reference of a hypervolume; the weights of the two points whose rewards are compared.
        difference: as measured, with its interval.
        standard_error: of the paired bootstrap; of several runs see `Variances.standard_error`.
        least: the smallest difference found with 80% power at the level of the intervals. Of several runs, the ends
            are those of the interval of the variance between runs.
        size: the difference to plan for, 0 where both methods are the same.
        prompts_needed: with as many runs; None where no number is enough.
        runs_needed: with as many prompts; None where no number is enough, or one run shows nothing of it.
    """

    method: str
    other: str
    measure: str
    at: str
    difference: Estimate
    standard_error: float
    least: Estimate
    size: float
    prompts_needed: int | None
    runs_needed: int | None
    variances: Variances

    @property
    def found(self) -> bool:
        """True if the interval of the difference leaves out 0."""
        return not self.difference.low <= 0 <= self.difference.high


def read_size(power: bool | float | str) -> Size | None:
    """Return what `report(power=…)` asks for: True for the difference seen, 5, or "10%"; None for False.

    Raises:
        UserError: no number above 0.
    """
    if power is True or power is False:
        return (lambda seen, other: abs(seen)) if power else None
    text = str(power).strip()
    try:
        number = float(text.removesuffix("%"))
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and number > 0):
        expected = "a difference in hypervolume above 0, such as 5, or 10% of the other method's"
        raise fail("not a size to plan for", where="--size", expected=expected, got=text)
    return (lambda seen, other: number / 100 * abs(other)) if text.endswith("%") else (lambda seen, other: number)


def detectable(table: Table, volumes: Volumes, runs: Sequence[Run], size_of: Size | None) -> list[Detectable]:
    """Return every pair of methods that the report compares: above each reference, then by reward at one λ.

    The λ is the shared one with the most equal weights. Rewards are planned for with the difference seen.

    Raises:
        UserError: fewer than two prompts or methods, or a method that only some of the runs have.
    """
    if size_of is None:
        return []
    prompts = table.measured[0].shape[1]
    _check(table, runs, prompts)
    found = []
    for other, method in combinations(volumes, 2):
        for reference, one in volumes[method].items():
            before = volumes[other][reference]
            assert one.by_run is not None and before.by_run is not None
            size = size_of(float((one.values - before.values)[0]), float(before.values[0]))
            change, each = estimate_samples(one.values - before.values), one.by_run - before.by_run
            found.append(_row((method, other, "hypervolume", reference), change, each, size, prompts))
        found += _rewards(table, method, other, prompts)
    return found


def _rewards(table: Table, method: str, other: str, prompts: int) -> Iterator[Detectable]:
    """Yield the rewards' differences at the shared weights that are most equal; none without shared weights."""
    rows = [{table.rows[row][0].spec.weights: row for row in table.methods()[name]} for name in (method, other)]
    shared = [weights for weights in rows[0] if weights in rows[1] and weights]
    if not shared:
        return
    middle = min(shared, key=lambda weights: (max(weights), weights))
    samples = table.changes(*(one[middle] for one in rows))
    place = f"λ = {', '.join(f'{weight:.4g}' for weight in (middle[:1] if len(middle) == 2 else middle))}"
    for column in table.objectives:
        each = samples.means[:, :, 0, column]
        change = estimate_samples(run_average(each, samples.drawn))
        key = (method, other, table.rewards[column], place)
        yield _row(key, change, each, abs(change.value), prompts)


def _row(key: tuple[str, str, str, str], change: Estimate, each: np.ndarray, size: float, prompts: int) -> Detectable:
    parts = variances(each, prompts)
    error = parts.standard_error()
    seeds = (None, None, None) if parts.seed is None else (None, parts.seed.low, parts.seed.high)
    least = (least_difference(parts.standard_error(seed=seed)) for seed in seeds)
    numbers = (prompts_needed(parts, size), runs_needed(parts, size)) if size else (None, None)
    return Detectable(*key, change, error, Estimate(*least), size, *numbers, parts)


def _check(table: Table, runs: Sequence[Run], prompts: int) -> None:
    where = " and ".join(str(run.folder) for run in runs)
    if prompts < 2:
        raise fail("one prompt shows no variance", where=where, expected="a sweep of 2 prompts or more, for --power")
    every = dict.fromkeys(entry["method"] for run in runs for entry in run.header["points"] if entry["method"] != SFT)
    compared = table.methods()
    if lacking := [name for name in every if name not in compared]:
        what = f"no point of {', '.join(lacking)} is in every run"
        raise fail(what, where=where, expected="runs of the same methods, for --power", remedy="finish the sweeps")
    if len(compared) < 2:
        expected = "two methods or more to compare, for --power"
        raise fail(f"the run has {len(compared)} method", where=where, expected=expected, got=", ".join(compared))

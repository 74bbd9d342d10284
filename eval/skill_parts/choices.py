"""What is chosen on validation rows, and what test rows say of it: pure numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest

import numpy as np
from numpy.typing import NDArray

from rewarded_lines.pareto.bootstrap import Estimate, estimate_samples, resample_runs, run_average

KEPT = 0.99
"""The share of a fine-tuned model's accuracy that an edited one must keep on validation rows."""
RESAMPLES, SEED = 2000, 0


def grid(most: float, count: int) -> list[float]:
    """Return `count` numbers up to `most`, equally spaced, without 0."""
    return [round(most * step / count, 6) for step in range(1, count + 1)]


def normalised(accuracies: Mapping[str, float], own: Mapping[str, float]) -> float:
    """Return the average over skills of a merge's accuracy over that of the skill's own model."""
    return float(np.mean([accuracies[skill] / own[skill] for skill in own]))


def best(values: Mapping[float, float]) -> float:
    """Return the number with the largest value; of equal ones the smallest, which changes least."""
    return min(values, key=lambda number: (-values[number], number))


def least_that_keeps(values: Mapping[float, float], own: float, kept: float = KEPT) -> float:
    """Return the smallest number whose value is at least `kept` of `own`; 1, the model itself, always is."""
    return min(number for number, value in values.items() if value >= kept * own or number == 1)


def ball(norms: Sequence[float], share: float) -> list[float]:
    """Return the scale of each block whose residual is projected onto a ball around the base.

    s = min(1, r/‖τ‖) with the radius r = share · max ‖τ‖ over the blocks. A ball around the whole residual would be
    WiSE-FT itself, so each block has its own.
    """
    radius = share * max(norms)
    return [min(1.0, radius / norm) if norm else 1.0 for norm in norms]


class Samples:
    """Resampled means of several models on the test rows of several tasks, over seeds.

    Rows are resampled together for all models, so differences are paired; seeds are resampled, too.
    """

    def __init__(self, seeds: Sequence[Mapping[str, Mapping[str, Sequence[float]]]]) -> None:
        """Resample results by model and task, one mapping for each seed."""
        self.models, self.tasks = list(seeds[0]), list(next(iter(seeds[0].values())))
        runs = [np.stack([_columns(run[model], self.tasks) for model in self.models]) for run in seeds]
        found = resample_runs(runs, RESAMPLES, SEED)
        self._means, self._drawn = found.means, found.drawn

    def mean(self, model: str, task: str) -> NDArray[np.float64]:
        """Return [1 + resamples, seeds] means of one model; row 0 is measured."""
        return self._means[:, :, self.models.index(model), self.tasks.index(task)]

    def share(self, model: str, own: Mapping[str, str]) -> NDArray[np.float64]:
        """Return the average over skills of a model's accuracy over that of the skill's own model."""
        shares = [self.mean(model, task) / self.mean(one, task) for task, one in own.items()]
        return np.asarray(np.mean(shares, axis=0))

    def estimate(self, values: NDArray[np.float64]) -> Estimate:
        """Return the average over seeds with its interval."""
        return estimate_samples(run_average(values, self._drawn))


def _columns(results: Mapping[str, Sequence[float]], tasks: Sequence[str]) -> NDArray[np.float64]:
    """Return [rows, tasks]; NaN where a task has fewer rows than another."""
    return np.array(list(zip_longest(*(results[task] for task in tasks), fillvalue=np.nan)), dtype=np.float64)

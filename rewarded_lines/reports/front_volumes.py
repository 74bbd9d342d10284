"""What the hypervolumes of a run are measured above, and what each of its points adds."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from rewarded_lines.config import SFT
from rewarded_lines.evaluator.paired_scores import Table
from rewarded_lines.pareto.approximate_hypervolume import affordable_contributions


def reference_points(table: Table, declared: Mapping[str, Mapping[str, float]]) -> dict[str, np.ndarray]:
    """Return each reference point in every run and resample, [1 + resamples, runs, objectives].

    Each resample has its own "sft" (SFT's mean scores) and "worst" (the lowest mean of any point).
    Declared references are constant.
    """
    scores = table.scores
    found = {SFT: scores[:, :, 0], "worst": scores.min(axis=2)}
    for label, at in declared.items():
        place = [at[table.rewards[index]] for index in table.objectives]
        found[label] = np.broadcast_to(place, found[SFT].shape)
    return found


def point_contributions(table: Table, exactly: bool) -> tuple[np.ndarray, bool]:
    """Return each point's contribution to its method's hypervolume above SFT, [points], and whether all are exact."""
    shares, exact, scores = np.zeros(len(table.rows)), True, table.scores[0]
    for rows in table.methods().values():
        found = [affordable_contributions(run[rows], run[0], exactly) for run in scores]
        shares[rows] = np.mean([values for values, _ in found], axis=0)
        exact = exact and all(precise for _, precise in found)
    return shares, exact

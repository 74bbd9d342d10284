"""The hypervolumes of a run: of each method in every resample, above each reference, and what each point adds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from rewarded_lines.evaluator.paired_scores import Table
from rewarded_lines.pareto.approximate_hypervolume import affordable_contributions
from rewarded_lines.pareto.comparison import Volumes, sample_volumes
from rewarded_lines.progress import Progress


@dataclass(frozen=True, eq=False)
class FrontVolumes:
    """Hypervolumes, and what they are measured above.

    Attributes:
        references: by name, in every run and resample, [1 + resamples, runs, objectives].
        volumes: by method and reference.
        shares: each point's contribution to its method's hypervolume above SFT, [points].
        exact_shares: whether all of these are exact.
    """

    references: dict[str, np.ndarray]
    volumes: Volumes
    shares: np.ndarray
    exact_shares: bool


def front_volumes(
    table: Table, declared: Mapping[str, Mapping[str, float]], exact: bool, progress: Progress
) -> FrontVolumes:
    """Return the hypervolumes of each method above SFT, the worst and the `declared` references.

    `exact` and `progress` are those of `sample_volumes`.
    """
    references = _references(table, declared)
    scores = table.samples.means[..., table.objectives]
    fronts = {name: scores[:, :, rows] for name, rows in table.methods().items()}
    volumes = sample_volumes(fronts, references, table.samples.drawn, exact=exact, progress=progress)
    return FrontVolumes(references, volumes, *_contributions(table, references["sft"], exact))


def _references(table: Table, declared: Mapping[str, Mapping[str, float]]) -> dict[str, np.ndarray]:
    """Return each reference point in every run and resample, [1 + resamples, runs, objectives].

    Each resample has its own "sft" (SFT's mean scores) and "worst" (the lowest mean of any point).
    Declared references are constant.
    """
    scores = table.samples.means[..., table.objectives]
    found = {"sft": scores[:, :, 0], "worst": scores.min(axis=2)}
    for label, at in declared.items():
        place = [at[table.rewards[index]] for index in table.objectives]
        found[label] = np.broadcast_to(place, found["sft"].shape)
    return found


def _contributions(table: Table, sft: np.ndarray, exactly: bool) -> tuple[np.ndarray, bool]:
    """Return each point's contribution to its method's hypervolume above SFT, and whether all are exact."""
    shares, exact = np.zeros(len(table.rows)), True
    for rows in table.methods().values():
        fronts = table.samples.means[0][:, rows][..., table.objectives]
        found = [affordable_contributions(*one, exactly) for one in zip(fronts, sft[0], strict=True)]
        shares[rows] = np.mean([values for values, _ in found], axis=0)
        exact = exact and all(precise for _, precise in found)
    return shares, exact

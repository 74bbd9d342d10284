"""Methods compared by the hypervolume of their fronts, resampled together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
from numpy.typing import ArrayLike

from rewarded_lines.pareto.approximate_hypervolume import (
    LIMIT,
    SampledVolumes,
    approximate_samples,
    parallel,
    samples_seconds,
)
from rewarded_lines.pareto.bootstrap import Estimate, estimate_samples, run_average
from rewarded_lines.pareto.hypervolume import hypervolume, hypervolumes
from rewarded_lines.progress import SILENT, Progress

# Method → reference → [1 + resamples] hypervolumes.
Volumes = dict[str, dict[str, SampledVolumes]]
# From this many rewards on, a hypervolume is slow enough for threads.
_SLOW = 6
# Seconds of one core that are worth a word before they are spent.
_NOTABLE = 5.0


@dataclass(frozen=True)
class MethodVolume:
    """The hypervolume of one method's points above one reference, in the product of the rewards' units.

    Attributes:
        error: relative standard error of the value; 0 if it is exact.
        resample_error: the largest relative error among resamples that were checked; 0 if they are exact.
    """

    method: str
    reference: str
    hypervolume: Estimate
    error: float
    resample_error: float


@dataclass(frozen=True)
class VolumeDifference:
    """Hypervolume of `method` minus that of `other`, resampled together.

    `share_positive` is the share of resamples with a difference above 0. `relative` is the
    difference over the other's hypervolume, None when that is 0.
    """

    method: str
    other: str
    reference: str
    difference: Estimate
    share_positive: float
    relative: float | None


def sample_volumes(
    fronts: Mapping[str, ArrayLike],
    references: Mapping[str, ArrayLike],
    drawn: ArrayLike | None = None,
    *,
    exact: bool = False,
    progress: Progress = SILENT,
) -> Volumes:
    """Return the hypervolume of each method above each reference in every sample.

    A reference is measured on the same prompts as the points, so each sample has its own. Noise
    stretches a front outwards, so hypervolumes lie a little high and those of resamples a little
    higher. The bias is much smaller in differences between methods with as many points.

    Above a reference where exact hypervolumes would take one core more than `LIMIT` seconds, those of all methods are
    approximated, see `approximate_samples`.

    Args:
        fronts: mean scores by method, [samples, points, rewards], or with several training runs
            [samples, runs, points, rewards]; row 0 is measured, the further rows are resamples.
        references: by name, [samples, rewards], or with runs [samples, runs, rewards].
        drawn: `RunSamples.drawn`, with runs only; the result is their average.
        exact: approximate nothing, whatever it costs.
        progress: is told the cost of what takes long before it is paid, and receives the finished hypervolumes.

    Raises:
        ValueError: the shapes do not fit, or a number is not finite.
    """
    found: Volumes = {method: {} for method in fronts}
    progress.expect(len(references) * sum(np.asarray(front)[..., 0, 0].size for front in fronts.values()))
    for name, reference in references.items():
        seconds = sum(samples_seconds(front, reference) for front in fronts.values())
        rough = seconds > LIMIT and not exact
        if seconds > _NOTABLE:
            so = "so the resamples are approximated" if rough else "divided by this machine's cores"
            progress.tell(f"exact hypervolumes above {name} would take a core about {_duration(seconds)}, {so}")
        progress.start(f"hypervolumes above {name}", counted=True)
        for method, front in fronts.items():
            one = _sampled(front, reference, rough, progress)
            values = one.values if drawn is None else run_average(one.values, drawn)
            if values.ndim != 1 or len(values) < 2:
                raise ValueError(f"{method} above {name}: expected one value for the data and each resample")
            found[method][name] = replace(one, values=values, by_run=None if drawn is None else one.values)
    return found


def _sampled(front: ArrayLike, reference: ArrayLike, rough: bool, progress: Progress) -> SampledVolumes:
    if rough:
        return approximate_samples(front, reference, progress.advance)
    values, origins = np.asarray(front, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    if values.shape[-1] < _SLOW:
        found = hypervolumes(values, origins)
        progress.advance(found.size)
    else:
        flat = values.reshape(-1, *values.shape[-2:]), origins.reshape(-1, origins.shape[-1])
        found = np.reshape(list(parallel(hypervolume, *flat, progress.advance)), values.shape[:-2])
    return SampledVolumes(found)


def _duration(seconds: float) -> str:
    """Return seconds in words, e.g. "40 s" or "3 h"."""
    size, unit = (3600, "h") if seconds >= 3600 else (60, "min") if seconds >= 60 else (1, "s")
    return f"{seconds / size:.2g} {unit}"


def method_volumes(volumes: Volumes) -> list[MethodVolume]:
    """Return each method's hypervolume above each reference with its interval."""
    return [
        MethodVolume(method, reference, estimate_samples(one.values), one.error, one.resample_error)
        for method, by_reference in volumes.items()
        for reference, one in by_reference.items()
    ]


def compare(volumes: Volumes) -> list[VolumeDifference]:
    """Return later method minus earlier, for each pair in the order of `volumes` and each reference.

    Δ_b = HV_b(method) − HV_b(other) in every resample b, and the interval is that of the Δ_b. Both
    come from the same prompts and runs, so a change that moves both alike cancels.
    """
    found = []
    for other, method in combinations(volumes, 2):
        for reference, one in volumes[method].items():
            before = volumes[other][reference].values
            change = one.values - before
            share = float((change[1:] > 0).mean())
            relative = float(change[0] / before[0]) if before[0] > 0 else None
            found.append(VolumeDifference(method, other, reference, estimate_samples(change), share, relative))
    return found

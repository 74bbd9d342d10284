"""Methods compared by the hypervolume of their fronts, resampled together. Pure: numbers in, dataclasses out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

from numpy.typing import ArrayLike

from rewarded_lines.pareto.bootstrap import LEVEL, Estimate, estimate_samples, run_average
from rewarded_lines.pareto.hypervolume import Array, hypervolumes

# Method → reference → hypervolume in the data themselves, then in each resample, [1 + resamples].
Volumes = dict[str, dict[str, Array]]


@dataclass(frozen=True)
class MethodVolume:
    """The hypervolume of one method's points above one reference, in the product of the rewards' units."""

    method: str
    reference: str
    hypervolume: Estimate


@dataclass(frozen=True)
class VolumeDifference:
    """Hypervolume of `method` minus that of `other`, resampled together.

    `share_positive` is the share of resamples in which the difference is above 0; `relative` is the
    difference over the other's hypervolume, None when that is 0.
    """

    method: str
    other: str
    reference: str
    difference: Estimate
    share_positive: float
    relative: float | None


def sample_volumes(
    fronts: Mapping[str, ArrayLike], references: Mapping[str, ArrayLike], drawn: ArrayLike | None = None
) -> Volumes:
    """Return the hypervolume of each method above each reference, in the data and in every resample.

    A reference is a statistic of the same prompts as the points, so each sample has its own. Noise in the means
    stretches a front outwards: hypervolumes lie a little high and those of the resamples a little higher. For
    differences between methods with as many points this bias is much smaller.

    Args:
        fronts: by method, mean scores; row 0 is the data themselves, the rows after it their resamples:
            [samples, points, rewards], or with several training runs [samples, runs, points, rewards]. Methods
            may have different numbers of points.
        references: by name, [samples, rewards], or with runs [samples, runs, rewards].
        drawn: with runs only, how often each was drawn, [samples, runs] as in `RunSamples`; the result is then
            the average of the runs' hypervolumes, each above its own reference.

    Raises:
        ValueError: the shapes do not fit, or a number is not finite.
    """
    found: Volumes = {}
    for method, front in fronts.items():
        found[method] = {}
        for name, reference in references.items():
            values = hypervolumes(front, reference)
            values = values if drawn is None else run_average(values, drawn)
            if values.ndim != 1 or len(values) < 2:
                raise ValueError(f"{method} above {name}: expected one value for the data and each resample")
            found[method][name] = values
    return found


def method_volumes(volumes: Volumes, level: float = LEVEL) -> list[MethodVolume]:
    """Return the hypervolume of each method above each reference with its interval, in the order of `volumes`."""
    return [
        MethodVolume(method, reference, estimate_samples(values, level))
        for method, by_reference in volumes.items()
        for reference, values in by_reference.items()
    ]


def compare(volumes: Volumes, level: float = LEVEL) -> list[VolumeDifference]:
    """Return later method minus earlier, for each pair in the order of `volumes` and each reference.

    Δ_b = HV_b(method) − HV_b(other) in every resample b. Both come from the same prompts (and runs), so what
    moves both alike cancels. The interval is that of the Δ_b.

    Args:
        volumes: from `sample_volumes`; every method above the same references.
        level: of the intervals.

    Raises:
        KeyError: a method lacks a reference that another has.
        ValueError: methods with different numbers of samples.
    """
    found = []
    for other, method in combinations(volumes, 2):
        for reference, values in volumes[method].items():
            before = volumes[other][reference]
            change = values - before
            share = float((change[1:] > 0).mean())
            relative = float(change[0] / before[0]) if before[0] > 0 else None
            estimated = estimate_samples(change, level)
            found.append(VolumeDifference(method, other, reference, estimated, share, relative))
    return found

"""Methods compared by the hypervolume of their fronts, resampled together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

from numpy.typing import ArrayLike

from rewarded_lines.pareto.bootstrap import LEVEL, Estimate, estimate_samples, run_average
from rewarded_lines.pareto.hypervolume import Array, hypervolumes

# Method → reference → [1 + resamples] hypervolumes; row 0 is measured.
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
    fronts: Mapping[str, ArrayLike], references: Mapping[str, ArrayLike], drawn: ArrayLike | None = None
) -> Volumes:
    """Return the hypervolume of each method above each reference in every sample.

    A reference is measured on the same prompts as the points, so each sample has its own. Noise
    stretches a front outwards, so hypervolumes lie a little high and those of resamples a little
    higher. The bias is much smaller in differences between methods with as many points.

    Args:
        fronts: mean scores by method, [samples, points, rewards], or with several training runs
            [samples, runs, points, rewards]; row 0 is measured, the further rows are resamples.
        references: by name, [samples, rewards], or with runs [samples, runs, rewards].
        drawn: `RunSamples.drawn`, with runs only; the result is their average.

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
    """Return each method's hypervolume above each reference with its interval."""
    return [
        MethodVolume(method, reference, estimate_samples(values, level))
        for method, by_reference in volumes.items()
        for reference, values in by_reference.items()
    ]


def compare(volumes: Volumes, level: float = LEVEL) -> list[VolumeDifference]:
    """Return later method minus earlier, for each pair in the order of `volumes` and each reference.

    Δ_b = HV_b(method) − HV_b(other) in every resample b, and the interval is that of the Δ_b. Both
    come from the same prompts and runs, so a change that moves both alike cancels.
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

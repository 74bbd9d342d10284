"""From the records of a run to its numbers: means, hypervolumes and differences, each with an interval.

Every interval is a percentile bootstrap over prompts, the same resamples for all points: it says how far a
number would move with other prompts, not with another training run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from itertools import combinations
from typing import Any

import numpy as np

from rewarded_lines.errors import Problem, UserError
from rewarded_lines.evaluation.records import Point, PointSpec, Run
from rewarded_lines.fronts.intervals import LEVEL, Estimate, estimate, mean_difference, resample_means
from rewarded_lines.fronts.pareto import hypervolumes

SEED = 0
RESAMPLES = 1000
# Method → reference → hypervolume in the run itself, then in each resample.
_Volumes = dict[str, dict[str, np.ndarray]]


@dataclass(frozen=True)
class PointSummary:
    """One point: mean scores in the rewards' units, KL to the SFT model in nats, response length in words."""

    method: str
    alpha: float
    beta: float
    weights: tuple[float, ...]
    rewards: dict[str, Estimate]
    kl: Estimate
    words: Estimate
    ended: float

    @property
    def lam(self) -> float | None:
        """The first policy's weight, λ; None for the SFT model."""
        return self.weights[0] if self.weights else None


@dataclass(frozen=True)
class MethodHypervolume:
    """The hypervolume of one method's points above one reference, in the product of the rewards' units."""

    method: str
    reference: str
    hypervolume: Estimate


@dataclass(frozen=True)
class HypervolumeDifference:
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


@dataclass(frozen=True)
class PolicyGain:
    """Paired mean difference between a policy itself, unmerged, and the SFT model, on every reward."""

    policy: str
    rewards: dict[str, Estimate]


@dataclass(frozen=True)
class Summary:
    """The numbers of a run, as `report/summary.json` holds them."""

    title: str
    prompts: int
    rewards: dict[str, str]
    policies: list[str]
    missing_points: int
    resamples: int
    seed: int
    level: float
    generation: dict[str, Any]
    references: dict[str, dict[str, float]]
    points: list[PointSummary]
    hypervolumes: list[MethodHypervolume]
    differences: list[HypervolumeDifference] = field(default_factory=list)
    policy_gains: list[PolicyGain] = field(default_factory=list)

    @property
    def sft(self) -> PointSummary:
        """The SFT model's own point."""
        return next(point for point in self.points if not point.weights)

    def methods(self) -> dict[str, list[PointSummary]]:
        """Return the merged points by method, in the order of λ."""
        names = dict.fromkeys(point.method for point in self.points if point.weights)
        return {name: [point for point in self.points if point.method == name] for name in names}

    def as_dict(self) -> dict[str, Any]:
        """Return the summary as what JSON can hold."""
        return asdict(self)


def summarise(run: Run, seed: int = SEED, level: float = LEVEL) -> Summary:
    """Return the numbers of a run.

    Args:
        run: a finished or unfinished run; methods are compared on the points it has.
        seed: of the bootstrap.
        level: of every interval.

    Raises:
        UserError: points that were not asked the same prompts, or scores that are not finite.
    """
    points = [run.sft, *(point for method in run.methods().values() for point in method)]
    names = list(run.rewards)
    _check(points, names)
    resamples = int(run.header.get("sweep", {}).get("resamples", RESAMPLES))
    measures = np.stack([_measures(point, names) for point in points])
    # Row 0 is the run itself, the rows after it are the resamples.
    means = np.concatenate([measures.mean(axis=1)[None], resample_means(measures, resamples, seed)])
    scores = means[:, :, : len(names)]
    references = _references(scores)
    volumes = _volumes(points, scores, references)
    return Summary(
        title=str(run.header.get("title", "")),
        prompts=len(run.sft.prompts),
        rewards=run.rewards,
        policies=list(run.header.get("policies", {})),
        missing_points=len(run.header["points"]) - len(points),
        resamples=resamples,
        seed=seed,
        level=level,
        generation=dict(run.header.get("generation", {})),
        references={k: dict(zip(names, at[0].tolist(), strict=True)) for k, at in references.items()},
        points=[_point_summary(point, names, means[:, k], level) for k, point in enumerate(points)],
        hypervolumes=_method_hypervolumes(volumes, level),
        differences=_differences(volumes, level),
        policy_gains=_policy_gains(run, resamples, seed, level),
    )


def _references(means: np.ndarray) -> dict[str, np.ndarray]:
    """Return each reference point in the run and in every resample, [1 + resamples, rewards].

    A reference is a statistic of the same prompts as the points, so each resample has its own: there "sft" is
    the SFT model's mean scores, "worst" the worst mean score of any point (SFT's too) on each axis.
    """
    return {"sft": means[:, 0], "worst": means.min(axis=1)}


def _volumes(points: list[Point], means: np.ndarray, references: Mapping[str, np.ndarray]) -> _Volumes:
    """Return the hypervolume of each method above each reference, in the run and in every resample.

    Noise in the means stretches a front outwards, so hypervolumes lie a little high and those of the
    resamples a little higher; differences between methods with as many points much less so.
    """
    rows: dict[str, list[int]] = {}
    for index, point in enumerate(points):
        if point.spec.weights:
            rows.setdefault(point.spec.method, []).append(index)
    return {
        method: {name: hypervolumes(means[:, chosen], reference) for name, reference in references.items()}
        for method, chosen in rows.items()
    }


def _method_hypervolumes(volumes: _Volumes, level: float) -> list[MethodHypervolume]:
    return [
        MethodHypervolume(method, reference, estimate(values[0], values[1:], level))
        for method, by_reference in volumes.items()
        for reference, values in by_reference.items()
    ]


def _differences(volumes: _Volumes, level: float) -> list[HypervolumeDifference]:
    """Return later method minus earlier, for each pair in the order of the sweep and each reference."""
    return [
        _difference(method, other, reference, volumes, level)
        for other, method in combinations(volumes, 2)
        for reference in volumes[method]
    ]


def _difference(method: str, other: str, reference: str, volumes: _Volumes, level: float) -> HypervolumeDifference:
    before = volumes[other][reference]
    change = volumes[method][reference] - before
    return HypervolumeDifference(
        method,
        other,
        reference,
        estimate(change[0], change[1:], level),
        share_positive=float((change[1:] > 0).mean()),
        relative=float(change[0] / before[0]) if before[0] > 0 else None,
    )


def _measures(point: Point, rewards: list[str]) -> np.ndarray:
    """Return the point's numbers for each prompt, [prompts, rewards + 2]: its scores, then KL and words."""
    columns = [*(point.scores[name] for name in rewards), point.kl, point.words]
    return np.stack(columns, axis=1).astype(np.float64)


def _point_summary(point: Point, rewards: list[str], means: np.ndarray, level: float) -> PointSummary:
    *scores, kl, words = (estimate(column[0], column[1:], level) for column in means.T)
    return PointSummary(
        method=point.spec.method,
        alpha=point.spec.alpha,
        beta=point.spec.beta,
        weights=point.spec.weights,
        rewards=dict(zip(rewards, scores, strict=True)),
        kl=kl,
        words=words,
        ended=float(np.mean(point.ended)),
    )


def _policy_gains(run: Run, resamples: int, seed: int, level: float) -> list[PolicyGain]:
    """Compare each policy that the sweep evaluated unmerged with SFT."""
    gains = []
    for index, policy in enumerate(run.header.get("policies", {})):
        point = next((point for point in run.points if is_policy(point.spec, index)), None)
        if point is not None:
            scores = {
                name: mean_difference(point.scores[name], run.sft.scores[name], resamples, seed, level)
                for name in run.rewards
            }
            gains.append(PolicyGain(policy, scores))
    return gains


def is_policy(point: PointSpec | PointSummary, index: int) -> bool:
    """Tell whether a point is policy `index` itself: all weight on it, scale 1 at every depth."""
    one_hot = tuple(float(place == index) for place in range(len(point.weights)))
    return bool(point.weights) and (point.alpha, point.beta, point.weights) == (1.0, 0.0, one_hot)


def _check(points: Iterable[Point], rewards: list[str]) -> None:
    """Refuse records that cannot be compared, naming every one of them."""
    points = list(points)
    problems = []
    for point in points:
        if point.prompts != points[0].prompts:
            problems.append(_problem(point, "was not asked the same prompts as the SFT model"))
        missing = [name for name in rewards if name not in point.scores]
        if missing:
            problems.append(_problem(point, f"has no score for {', '.join(missing)}"))
            continue
        for name, values in [*((name, point.scores[name]) for name in rewards), ("KL", point.kl)]:
            if wrong := int((~np.isfinite(values)).sum()):
                what = f"{name} is not finite for {wrong} of {len(values)} responses"
                problems.append(_problem(point, what))
    if problems:
        raise UserError(problems)


def _problem(point: Point, what: str) -> Problem:
    return Problem(what, where=str(point.spec), remedy="delete its file in points/ and run the sweep again")

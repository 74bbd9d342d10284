"""Hypervolumes of many rewards: what exact ones cost, and their approximation where that is too much.

Which of the two is taken depends on numbers of points and rewards only, never on the speed of the machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import moocore
import numpy as np
from numpy.typing import ArrayLike

from rewarded_lines.pareto.hypervolume import Array, contributions, finite, hypervolume, nondominated

# Seconds of one core that exact hypervolumes may take: of all resamples above one reference, or of one front.
LIMIT = 120.0
# Directions of an approximation, repetitions of a careful one, and resamples whose error is measured.
_DIRECTIONS, _REPEATS, _CHECKS = 2**15, 16, 8
# At most this many distances are in memory at once: 32 MB.
_CELLS = 2**22


@dataclass(frozen=True, eq=False)
class SampledVolumes:
    """Hypervolumes of the samples of one front, [1 + resamples, …], and their errors; 0 is exact.

    Attributes:
        values: row 0 is measured, the further rows are resamples.
        by_run: before the average over training runs, [1 + resamples, runs]; None if there is no such average.
        error: relative standard error of the measured value.
        resample_error: the largest relative error among resamples that were checked.
    """

    values: Array
    error: float = 0.0
    resample_error: float = 0.0
    by_run: Array | None = None


def exact_seconds(points: int, rewards: int) -> float:
    """Return about how many seconds of one core moocore needs for one exact hypervolume.

    5·10⁻⁵ + 5·10⁻⁶ (n/5.2)^(m − 4), for n points that count and m rewards, at least 4. Measured with moocore 0.3 on one
    core for n = 12 … 200 and m = 5 … 10: the true time was a sixth of this to four times as much.
    """
    return float(5e-5 + 5e-6 * (points / 5.2) ** max(0, rewards - 4))


def counted(points: Array, reference: Array) -> int:
    """Return how many points a hypervolume depends on: above the reference and nondominated."""
    above = points[(points > reference).all(axis=1)]
    return int(nondominated(above).sum())


def samples_seconds(fronts: ArrayLike, references: ArrayLike) -> float:
    """Return about how many seconds exact hypervolumes of [1 + resamples, …, points, rewards] take on one core."""
    values, origins = _flat(fronts, references)
    if values.shape[-1] <= 2 or not values.shape[-2]:
        return 0.0
    most = max(counted(*one) for one in zip(values[: 1 + _CHECKS], origins, strict=False))
    return len(values) * exact_seconds(most, values.shape[-1])


def approximation(points: ArrayLike, reference: ArrayLike, seed: int | None = None) -> float:
    """Return an approximate hypervolume, in the product of the rewards' units.

    HV ≈ (2π^(m/2)/Γ(m/2))/(m 2^m) · Π_i d_i · mean_w max_p min_i ((p_i − r_i)/(d_i w_i))^m over unit directions w > 0,
    by moocore. d is the front's extent above the reference. The directions depend on the number of rewards alone,
    so similar fronts have similar errors. In 8 rewards errors of 1 to 3 % were measured.

    Args:
        points: [points, rewards].
        reference: [rewards].
        seed: for directions of their own, drawn at random.

    Source: Deng and Zhang, "Approximating Hypervolume and Hypervolume Contributions Using Polar Coordinate", IEEE
    Transactions on Evolutionary Computation 23(5), 2019; López-Ibáñez, documentation of `moocore.hv_approx`, 2026.
    """
    values, origin = finite(points, "points, rewards"), finite(reference, "reference")
    above = values[(values > origin).all(axis=1)]
    if not len(above):
        return 0.0
    # Rewards in units of different sizes would leave few directions to most of the front.
    sides = above.max(axis=0) - origin
    method = {} if seed is None else {"method": "DZ2019-MC", "seed": seed}
    share = moocore.hv_approx((above - origin) / sides, ref=0.0, maximise=True, nsamples=_DIRECTIONS, **method)
    return float(share * sides.prod())


def careful(points: ArrayLike, reference: ArrayLike, limit: float = LIMIT) -> tuple[float, float]:
    """Return a hypervolume and its relative standard error: exact, or the mean of independent approximations.

    The exact one may take `limit` seconds.
    """
    values, origin = finite(points, "points, rewards"), finite(reference, "reference")
    count = counted(values, origin)
    if not count or exact_seconds(count, len(origin)) <= limit:
        return hypervolume(values, origin), 0.0
    found = [approximation(values, origin, seed) for seed in range(_REPEATS)]
    mean = float(np.mean(found))
    return mean, float(np.std(found, ddof=1) / np.sqrt(_REPEATS) / mean)


def approximate_samples(
    fronts: ArrayLike, references: ArrayLike, done: Callable[[int], None] = lambda _: None
) -> SampledVolumes:
    """Return hypervolumes of a front and its resamples where exact ones cost too much.

    The measured one is `careful`. A resample b is its approximation A_b times HV_0/A_0, so that value and interval
    belong together. The first resamples are computed carefully, too, which gives their error.

    Args:
        fronts: [1 + resamples, …, points, rewards].
        references: [1 + resamples, …, rewards].
        done: receives the number of finished hypervolumes.
    """
    values, origins = _flat(fronts, references)
    shape, limit = np.shape(fronts)[:-2], LIMIT / (1 + _CHECKS)
    rough = np.reshape(list(parallel(approximation, values, origins, done)), shape)
    runs = rough[0].size
    some = list(parallel(partial(careful, limit=limit), values[: runs * (1 + _CHECKS)], origins))
    exact, errors = (np.reshape(column, (-1, *shape[1:])) for column in zip(*some, strict=True))
    found = rough * np.divide(exact[0], rough[0], out=np.ones_like(rough[0]), where=rough[0] > 0)
    # Not the product, which may differ in its last bit.
    found[0] = exact[0]
    positive = exact[1:] > 0
    off = np.abs(found[1 : len(exact)] - exact[1:])[positive] / exact[1:][positive]
    return SampledVolumes(found, float(errors[0].max()), float(max([*off, errors.max()])))


def affordable_contributions(points: ArrayLike, reference: ArrayLike, exact: bool = False) -> tuple[Array, bool]:
    """Return how much hypervolume each point alone brings, see `contributions`, and whether that is exact.

    With `exact` it is, however long that takes. Otherwise A(P) − A(P ∖ {p}), with `approximation`'s formula and one set
    of random directions, so that noise cancels: only the best point of a direction adds there, what it is ahead of the
    second. In 8 rewards, errors were up to a seventh of the largest contribution.
    """
    values, origin = finite(points, "points, rewards"), finite(reference, "reference")
    count = counted(values, origin)
    if exact or count * exact_seconds(count, len(origin)) <= LIMIT:
        return contributions(values, origin), True
    sides = values.max(axis=0) - origin
    found, lengths = np.zeros(len(values)), (values - origin) / np.where(sides > 0, sides, 1.0)
    for directions in _directions(lengths):
        # The origin is one more point, so that there is always a second.
        reached = np.hstack([_reached(lengths, directions), np.zeros((len(directions), 1))])
        best = reached.argmax(axis=1)
        reached.partition(len(values) - 1, axis=1)
        ahead = reached[:, -1] ** len(origin) - reached[:, -2] ** len(origin)
        np.add.at(found, best[ahead > 0], ahead[ahead > 0])
    return found * _unit(sides), False


def approximate_gains(
    points: ArrayLike, candidates: ArrayLike, reference: ArrayLike, sides: Array
) -> tuple[float, Array]:
    """Return an approximate hypervolume, and what each candidate would add to it, [candidates], none below 0.

    By the formula of `approximation`, all with the same random directions, so that noise cancels.

    Args:
        points: [points, rewards].
        candidates: [candidates, rewards].
        reference: [rewards].
        sides: d of `approximation`, [rewards], above 0.
    """
    values, origin = finite(points, "points, rewards"), finite(reference, "reference")
    lengths = (np.vstack([values, finite(candidates, "candidates, rewards")]) - origin) / sides
    whole, gains = 0.0, np.zeros(len(lengths) - len(values))
    for directions in _directions(lengths):
        reached = np.maximum(_reached(lengths, directions), 0.0)
        before = reached[:, : len(values)].max(axis=1, keepdims=True)
        whole += float((before ** len(origin)).sum())
        gains += (np.maximum(reached[:, len(values) :], before) ** len(origin) - before ** len(origin)).sum(axis=0)
    return whole * _unit(sides), gains * _unit(sides)


def _directions(points: Array) -> Iterator[Array]:
    """Yield unit directions above 0 in parts that fit the memory, [directions, rewards]; always the same."""
    found = np.abs(np.random.default_rng(0).standard_normal((_DIRECTIONS, points.shape[1])))
    found /= np.linalg.norm(found, axis=1, keepdims=True)
    yield from np.array_split(found, -(-_DIRECTIONS * len(points) // _CELLS))


def _reached(points: Array, directions: Array) -> Array:
    """Return how far each point's box reaches from 0 in each direction, min_i p_i/w_i: [directions, points]."""
    reached = np.full((len(directions), len(points)), np.inf)
    for values, steps in zip(points.T, directions.T, strict=True):
        np.minimum(reached, values / steps[:, None], out=reached)
    return reached


def _unit(sides: Array) -> float:
    """Return what the sum over all directions of lengths to the m is multiplied by; see `approximation`."""
    rewards = len(sides)
    sphere = 2 * math.pi ** (rewards / 2) / math.gamma(rewards / 2)
    return float(sphere / 2**rewards / rewards / _DIRECTIONS * sides.prod())


def parallel(
    volume: Callable[[Array, Array], object],
    fronts: Array,
    origins: Array,
    done: Callable[[int], None] = lambda _: None,
) -> Iterator[object]:
    """Yield a function's result for each of many fronts, in order; moocore lets threads work side by side."""
    pool = ThreadPoolExecutor()
    try:
        for found in pool.map(volume, fronts, origins[: len(fronts)]):
            done(1)
            yield found
    finally:
        pool.shutdown(cancel_futures=True)


def _flat(fronts: ArrayLike, references: ArrayLike) -> tuple[Array, Array]:
    values, origins = finite(fronts, "samples, …, points, rewards"), finite(references, "samples, …, rewards")
    return values.reshape(-1, *values.shape[-2:]), origins.reshape(-1, origins.shape[-1])

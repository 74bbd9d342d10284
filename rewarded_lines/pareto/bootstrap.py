"""Seeded bootstrap: how far a number would move with other prompts or other training runs.

A score may be missing (NaN). Every mean is then over what is there, in a resample over what the
resample drew.

Functions raise ValueError for shapes that do not fit, for no runs, prompts or resamples,
and for a level outside (0, 1).

Sources: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapters 6 and 13; Davison
and Hinkley, "Bootstrap Methods and their Application", 1997, section 3.8 (two levels).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

LEVEL = 0.95
_Z = 1.959964


@dataclass(frozen=True)
class Estimate:
    """A value and the ends of its interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class RunSamples:
    """Mean scores of several training runs; row 0 is measured, the further rows are resamples.

    Attributes:
        means: [1 + resamples, runs, points, rewards], in the units of the scores. Resamples in which
            some mean has no score at all are left out.
        drawn: [1 + resamples, runs], how often each run was drawn; every row sums to the number of runs.
    """

    means: NDArray[np.float64]
    drawn: NDArray[np.int64]


def present_mean(values: ArrayLike, axis: int) -> NDArray[np.float64]:
    """Return the mean along an axis of what is there, Σ h·s / Σ h with h = 0 where s is NaN; NaN for none."""
    array = np.asarray(values, dtype=np.float64)
    there = ~np.isnan(array)
    if there.all():
        return np.asarray(array.mean(axis=axis))
    return _shares(np.where(there, array, 0.0).sum(axis=axis), there.sum(axis=axis))


def resample_means(scores: ArrayLike, resamples: int, seed: int | Sequence[int]) -> NDArray[np.float64]:
    """Return mean scores in resamples of the prompts: [resamples, points, rewards].

    m*_b = (1/n) Σ_j c_bj · s_j with c_b ~ Multinomial(n; 1/n, …, 1/n): how often each of n prompts
    is drawn with replacement. All points share the draws, so differences between points are paired
    by prompt. The same seed and number of prompts give the same draws.

    Where scores are missing, m*_b = Σ_j c_bj · h_j · s_j / Σ_j c_bj · h_j with h_j = 0 for a missing
    s_j and else 1; NaN if the resample drew no prompt that has a score.

    Args:
        scores: s, [points, prompts, rewards], NaN for a missing one.
        resamples: how many, B.
        seed: of the draws.
    """
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 3 or values.shape[1] == 0:
        raise ValueError(f"expected [points, prompts, rewards] with a prompt, got shape {values.shape}")
    if resamples < 1:
        raise ValueError(f"{resamples} resamples; at least 1 is needed")
    points, prompts, rewards = values.shape
    draws = np.random.default_rng(seed).multinomial(prompts, np.full(prompts, 1 / prompts), size=resamples)
    columns = values.transpose(1, 0, 2).reshape(prompts, points * rewards)
    counts, there = draws.astype(np.float64), ~np.isnan(columns)
    means = (
        counts @ columns / prompts if there.all() else _shares(counts @ np.where(there, columns, 0.0), counts @ there)
    )
    return np.asarray(means.reshape(resamples, points, rewards))


def resample_runs(scores: Sequence[ArrayLike], resamples: int, seed: int) -> RunSamples:
    """Return mean scores of every run in two-level resamples.

    Level 1 draws S of the S runs with replacement, level 2 draws the prompts as `resample_means`
    does. Runs with as many prompts as the first share one draw of prompts; a run with another
    number gets its own.

    The draws depend only on `seed` and the numbers of runs, prompts and resamples, so methods that
    are resampled in separate calls are still paired. With one run, `means[1:, 0]` is
    `resample_means(scores[0], resamples, seed)`.

    With S runs an interval is too narrow by about √((S − 1)/S) in the part that comes from
    training. With 2 or 3 runs read it as a lower limit.

    With missing scores, a resample in which any mean of any run has no score is left out of all. So
    intervals hold given that every mean exists, and `means` may have fewer resamples.

    Args:
        scores: one [points, prompts, rewards] for each run; points and rewards in the same order.
        resamples: how many.
        seed: of the draws.
    """
    runs = [np.asarray(run, dtype=np.float64) for run in scores]
    if len({(run.shape[0], *run.shape[2:]) if run.ndim else () for run in runs}) != 1:
        raise ValueError(f"expected runs with the same points and rewards, got shapes {[run.shape for run in runs]}")
    prompts = runs[0].shape[1:2]
    seeds = [seed if run.shape[1:2] == prompts else [seed, *run.shape[1:2]] for run in runs]
    resampled = [resample_means(run, resamples, own) for run, own in zip(runs, seeds, strict=True)]
    means = [np.concatenate([present_mean(run, 1)[None], again]) for run, again in zip(runs, resampled, strict=True)]
    # A random stream of its own: the prompts drawn must not depend on the number of runs.
    stream = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(0,)))
    drawn = stream.multinomial(len(runs), np.full(len(runs), 1 / len(runs)), size=resamples)
    samples = np.stack(means, axis=1)
    whole = ~np.isnan(samples).any(axis=(1, 2, 3))
    whole[0] = True
    return RunSamples(samples[whole], np.concatenate([np.ones((1, len(runs)), np.int64), drawn])[whole])


def _shares(sums: NDArray[np.float64], counts: NDArray[Any]) -> NDArray[np.float64]:
    """Return sums over counts; NaN where nothing was counted."""
    return np.asarray(np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0))


def run_average(statistics: ArrayLike, drawn: ArrayLike) -> NDArray[np.float64]:
    """Return the average of [samples, runs, …] over the drawn runs, Σ_s c_bs · t_bs / Σ_s c_bs."""
    values, counts = np.asarray(statistics, dtype=np.float64), np.asarray(drawn, dtype=np.float64)
    if counts.ndim != 2 or values.shape[:2] != counts.shape:
        raise ValueError(f"statistics of shape {values.shape} for draws of shape {counts.shape}")
    total = np.einsum("bs...,bs->b...", values, counts)
    shares = counts.sum(axis=1).reshape(-1, *(1 for _ in values.shape[2:]))
    return np.asarray(total / shares)


def interval(samples: ArrayLike, level: float = LEVEL) -> NDArray[np.float64]:
    """Return the (1 − level)/2 and (1 + level)/2 quantiles: [resamples, …] → [2, …]."""
    if not 0 < level < 1:
        raise ValueError(f"a level of {level}; expected one between 0 and 1")
    return np.asarray(np.quantile(np.asarray(samples), [(1 - level) / 2, (1 + level) / 2], axis=0))


def estimate_samples(samples: ArrayLike, level: float = LEVEL) -> Estimate:
    """Return the value in row 0 of [1 + resamples] with the interval of the rows after it."""
    values = np.asarray(samples, dtype=np.float64)
    low, high = interval(values[1:], level)
    return Estimate(float(values[0]), float(low), float(high))


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """Return Wilson's 95% score interval of a proportion."""
    share, weight = successes / trials, _Z**2 / trials
    centre = (share + weight / 2) / (1 + weight)
    half = _Z * math.sqrt(share * (1 - share) / trials + weight / (4 * trials)) / (1 + weight)
    return centre - half, centre + half

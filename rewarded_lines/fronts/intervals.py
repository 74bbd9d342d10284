"""Seeded bootstrap over prompts: how far a mean would move had other prompts been drawn. Pure numbers.

Source: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapters 6 and 13.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A value and the ends of its interval, all in the value's own unit."""

    value: float
    low: float
    high: float


def resample_means(scores: ArrayLike, resamples: int, seed: int) -> NDArray[np.float64]:
    """Return the mean scores of every point in bootstrap resamples of the prompts.

    m*_b = (1/n) Σ_j c_bj · s_j with c_b ~ Multinomial(n; 1/n, …, 1/n): how often each prompt comes up when n
    are drawn with replacement. The counts are the same for every point and reward, so differences between
    points are paired by prompt.

    Args:
        scores: [points, prompts, rewards].
        resamples: how many, B.
        seed: of the draws; the same seed and number of prompts give the same resamples.

    Returns:
        [resamples, points, rewards], in the units of `scores`.

    Raises:
        ValueError: `scores` has another shape or no prompts, or `resamples` is less than 1.
    """
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 3 or values.shape[1] == 0:
        raise ValueError(f"expected [points, prompts, rewards] with a prompt, got shape {values.shape}")
    if resamples < 1:
        raise ValueError(f"{resamples} resamples; at least 1 is needed")
    points, prompts, rewards = values.shape
    draws = np.random.default_rng(seed).multinomial(prompts, np.full(prompts, 1 / prompts), size=resamples)
    columns = values.transpose(1, 0, 2).reshape(prompts, points * rewards)
    means: NDArray[np.float64] = draws.astype(np.float64) @ columns / prompts
    return means.reshape(resamples, points, rewards)


def interval(samples: ArrayLike, level: float = LEVEL) -> NDArray[np.float64]:
    """Return the percentile interval of bootstrap samples.

    Args:
        samples: [resamples, …].
        level: the share of the samples inside, between 0 and 1.

    Returns:
        [2, …]: the (1 − level)/2 and (1 + level)/2 quantiles.

    Raises:
        ValueError: `level` lies outside 0 … 1.
    """
    if not 0 < level < 1:
        raise ValueError(f"a level of {level}; expected one between 0 and 1")
    return np.asarray(np.quantile(np.asarray(samples), [(1 - level) / 2, (1 + level) / 2], axis=0))


def estimate(value: float, samples: ArrayLike, level: float = LEVEL) -> Estimate:
    """Return `value` with the percentile interval of its bootstrap samples, [resamples]."""
    low, high = interval(samples, level)
    return Estimate(float(value), float(low), float(high))


def mean_difference(first: ArrayLike, second: ArrayLike, resamples: int, seed: int, level: float = LEVEL) -> Estimate:
    """Return the mean of first − second, paired by prompt, with its bootstrap interval.

    Args:
        first: [prompts], scores of one point.
        second: [prompts], scores of another on the same prompts in the same order.
        resamples: how many.
        seed: of the draws; see `resample_means`.
        level: of the interval.

    Raises:
        ValueError: the two do not have the same number of prompts.
    """
    one, other = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if one.ndim != 1 or one.shape != other.shape:
        raise ValueError(f"expected two [prompts] of one length, got shapes {one.shape} and {other.shape}")
    difference = one - other
    samples = resample_means(difference[None, :, None], resamples, seed)[:, 0, 0]
    return estimate(float(difference.mean()), samples, level)

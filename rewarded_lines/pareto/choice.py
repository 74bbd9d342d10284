"""One policy chosen among candidates by their mean scores. Pure: numbers in, dataclasses out.

Every rule keeps one order: the smallest of the largest shortfalls first (0 for all that qualify), then the largest
objective, then the largest scores, reward by reward, then the first candidate. Equal candidates are therefore always
ordered the same way, and a dominated one is chosen only when its order alone decides.

The best of many candidates was also lucky: its value lies a little high, and its interval does not correct that. Its
scores on fresh prompts do not have this bias.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from rewarded_lines.pareto.hypervolume import Array, nondominated

# Sums of normalised scores that differ by less are equal: rounding makes that much on a straight front of any size.
DECIMALS = 12


@dataclass(frozen=True)
class Choice:
    """The chosen candidate, or the nearest when none qualifies.

    Attributes:
        index: of the candidate among those given.
        value: its objective: a mean score, or a weighted sum of standardised ones.
        qualifies: whether it meets every minimum; if not, no candidate does.
        shortfalls: by reward with a minimum, how far its mean lies below that, in the reward's unit; 0 if it does not.
    """

    index: int
    value: float
    qualifies: bool
    shortfalls: dict[int, float]


@dataclass(frozen=True)
class Knee:
    """The point of a front that gives up least of everything.

    Attributes:
        index: of the point among those given.
        height: (Σ_i n_i − 1)/√m, how far it lies above the plane through the unit points of the m normalised
            rewards; 0 or less where the front is straight or bulges inwards, so that there is no real knee.
        normalised: n, its scores from 0, the front's worst, to 1, its best.
    """

    index: int
    height: float
    normalised: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class Rule:
    """A linear objective of mean scores s, Σ_i slopes_i · s_i − offset, under minima s_i ≥ b_i.

    Attributes:
        slopes: [rewards].
        offset: in the objective's unit.
        minima: b by the reward's index, in that reward's unit.
        scale: [rewards], by which shortfalls in different units are divided before they are compared.
    """

    slopes: Array
    offset: float
    minima: Mapping[int, float]
    scale: Array

    def lacks(self, means: Array) -> Array:
        """Return b − s, above 0 where a mean lies below its minimum: [candidates, rewards] → [candidates, minima]."""
        return np.asarray(np.array(list(self.minima.values()), dtype=np.float64) - means[:, list(self.minima)])

    def choose(self, means: Array) -> Choice:
        """Return the best candidate of means, [candidates, rewards], in the order at the head of this module."""
        # Not `@`: its sums depend on the shape of the whole array, and equal candidates must get equal values.
        values = (means * self.slopes).sum(axis=-1) - self.offset
        short = np.maximum(0.0, self.lacks(means))
        worst = (short / self.scale[list(self.minima)]).max(axis=-1, initial=0.0)
        # The last key of a lexsort counts first.
        index = int(np.lexsort([*(-means.T[::-1]), -values, worst])[0])
        met = dict(zip(self.minima, short[index].tolist(), strict=True))
        return Choice(index, float(values[index]), not short[index].any(), met)


def best_under(
    means: ArrayLike, minima: Mapping[int, float], maximise: int, *, scale: ArrayLike | None = None
) -> Choice:
    """Return the candidate with the highest mean on one reward among those that meet every minimum.

    argmax_p s_p,k subject to s_p,i ≥ b_i for every i in `minima`. When none qualifies, the nearest:
    argmin_p max_i (b_i − s_p,i)₊ / scale_i.

    Args:
        means: [candidates, rewards], s, each reward in its own unit.
        minima: by the reward's index, the bound b in that reward's unit; none for no constraint.
        maximise: k, the index of the reward to be as high as can be.
        scale: [rewards], above 0; makes shortfalls in different units comparable, such as the standard deviation
            of the SFT model's scores. 1 by default.

    Raises:
        ValueError: no candidates, an index without a reward, a scale not above 0, or arrays that are not finite or
            do not fit.
    """
    values = _candidates(means)
    rewards = values.shape[1]
    if not 0 <= maximise < rewards:
        raise ValueError(f"no reward with index {maximise}; there are {rewards}")
    return Rule(np.eye(rewards)[maximise], 0.0, _minima(minima, rewards), _scale(scale, rewards)).choose(values)


def best_weighted(
    means: ArrayLike, weights: ArrayLike, *, centre: ArrayLike | None = None, scale: ArrayLike | None = None
) -> Choice:
    """Return the candidate with the highest weighted sum of standardised means, argmax_p Σ_i w_i (s_p,i − c_i) / d_i.

    Args:
        means: [candidates, rewards], s, each reward in its own unit.
        weights: [rewards], w, none negative and one above 0.
        centre: [rewards], c in the rewards' units, such as the SFT model's means; 0 by default.
        scale: [rewards], d in the rewards' units, above 0, such as the standard deviation of the SFT model's scores
            over prompts; 1 by default.

    Raises:
        ValueError: no candidates, wrong weights, a scale not above 0, or arrays that are not finite or do not fit.
    """
    values = _candidates(means)
    return weighted_rule(values.shape[1], weights, {}, centre, scale).choose(values)


def knee(means: ArrayLike) -> Knee:
    """Return the nondominated point that lies farthest above the plane through the front's extremes.

    n_p,i = (s_p,i − nadir_i)/(ideal_i − nadir_i) over the nondominated points, 0 where these are equal; the knee is
    argmax_p Σ_i n_p,i. Of equal sums the most even point, with the largest smallest n, is taken.

    Source: Das, "On characterizing the 'knee' of the Pareto curve based on Normal-Boundary Intersection",
    Structural Optimization 18, 1999.

    Args:
        means: [points, rewards], s, each reward in its own unit.

    Raises:
        ValueError: no points, or an array that is not finite or not of that shape.
    """
    values = _candidates(means)
    front = np.flatnonzero(nondominated(values))
    worst, best = values[front].min(axis=0), values[front].max(axis=0)
    normalised = (values[front] - worst) / np.where(best > worst, best - worst, 1.0)
    sums, least = normalised.sum(axis=1).round(DECIMALS), normalised.min(axis=1).round(DECIMALS)
    place = int(np.lexsort([*(-values[front].T[::-1]), -least, -sums])[0])
    height = (normalised[place].sum() - 1) / np.sqrt(values.shape[1])
    return Knee(int(front[place]), float(height), tuple(normalised[place].tolist()))


def weighted_rule(
    rewards: int, weights: ArrayLike, minima: Mapping[int, float], centre: ArrayLike | None, scale: ArrayLike | None
) -> Rule:
    """Return the rule of the objective Σ_i w_i (s_i − c_i) / d_i under minima; see `best_weighted` for its parts.

    Raises:
        ValueError: an array of another shape or not finite, negative weights or none above 0, a scale not above 0, a
            minimum that is not finite or of no reward.
    """
    shares = np.asarray(weights, dtype=np.float64)
    if shares.shape != (rewards,) or not (np.isfinite(shares) & (shares >= 0)).all() or not shares.any():
        raise ValueError(f"expected {rewards} weights, none negative and one above 0, got {shares.tolist()}")
    middle = np.zeros(rewards) if centre is None else np.asarray(centre, dtype=np.float64)
    if middle.shape != (rewards,) or not np.isfinite(middle).all():
        raise ValueError(f"expected {rewards} finite centres, got {middle.tolist()}")
    spread = _scale(scale, rewards)
    slopes = shares / spread
    return Rule(slopes, float(slopes @ middle), _minima(minima, rewards), spread)


def _scale(scale: ArrayLike | None, rewards: int) -> Array:
    spread = np.ones(rewards) if scale is None else np.asarray(scale, dtype=np.float64)
    if spread.shape != (rewards,) or not (np.isfinite(spread) & (spread > 0)).all():
        raise ValueError(f"expected {rewards} scales above 0, got {spread.tolist()}")
    return spread


def _minima(minima: Mapping[int, float], rewards: int) -> dict[int, float]:
    if wrong := [index for index in minima if not 0 <= index < rewards]:
        raise ValueError(f"no reward with index {wrong[0]}; there are {rewards}")
    if not np.isfinite(list(minima.values())).all():
        raise ValueError(f"expected finite minima, got {dict(minima)}")
    return dict(minima)


def _candidates(means: ArrayLike) -> Array:
    values = np.asarray(means, dtype=np.float64)
    if values.ndim != 2 or 0 in values.shape or not np.isfinite(values).all():
        raise ValueError(f"expected finite [candidates, rewards] with one of each, got shape {values.shape}")
    return values

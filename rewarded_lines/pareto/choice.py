"""One policy chosen among candidates by their mean scores.

Every rule has the same order: the smallest largest shortfall (0 if all minima are met), the
largest objective, the largest scores reward by reward, the first candidate.

The best of many candidates was also lucky: its value and interval lie a little high. Fresh
prompts remove this bias.

Functions raise ValueError for no candidates, arrays that are not finite or do not fit, a
minimum of no reward, weights that are negative or all 0, and a scale not above 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from rewarded_lines.pareto.hypervolume import Array, finite, nondominated

# Normalised scores are compared at this many decimals, so that rounding makes no difference.
DECIMALS = 12


@dataclass(frozen=True)
class Choice:
    """The chosen candidate, or the nearest if none qualifies.

    Attributes:
        index: of the candidate.
        value: its objective.
        qualifies: whether it meets every minimum; if not, no candidate does.
        shortfalls: by reward with a minimum, how far the mean lies below it, in the reward's unit, or 0.
    """

    index: int
    value: float
    qualifies: bool
    shortfalls: dict[int, float]


@dataclass(frozen=True, eq=False)
class Rule:
    """A linear objective of mean scores s, Σ_i slopes_i · s_i − offset, under minima s_i ≥ b_i.

    Attributes:
        slopes: [rewards].
        offset: in the objective's unit.
        minima: b by the reward's index, in that reward's unit.
        scale: [rewards]; divides shortfalls in different units before they are compared.
    """

    slopes: Array
    offset: float
    minima: Mapping[int, float]
    scale: Array

    def lacks(self, means: Array) -> Array:
        """Return b − s, above 0 below a minimum: [candidates, rewards] → [candidates, minima]."""
        return np.asarray(np.array(list(self.minima.values()), dtype=np.float64) - means[:, list(self.minima)])

    def choose(self, candidates: ArrayLike) -> Choice:
        """Return the best of mean scores, [candidates, rewards], in the order in this module's docstring."""
        means = _candidates(candidates)
        if means.shape[1] != len(self.slopes):
            raise ValueError(f"expected a weight for each of {means.shape[1]} rewards")
        # Not `@`: its sums depend on the array's shape, and equal candidates need equal values.
        values = (means * self.slopes).sum(axis=-1) - self.offset
        short = np.maximum(0.0, self.lacks(means))
        worst = (short / self.scale[list(self.minima)]).max(axis=-1, initial=0.0)
        # The last key of a lexsort counts first.
        index = int(np.lexsort([*(-means.T[::-1]), -values, worst])[0])
        met = dict(zip(self.minima, short[index].tolist(), strict=True))
        return Choice(index, float(values[index]), not short[index].any(), met)


def weighted_rule(
    weights: ArrayLike,
    minima: Mapping[int, float] | None = None,
    *,
    centre: ArrayLike | None = None,
    scale: ArrayLike | None = None,
) -> Rule:
    """Return the rule that takes the highest weighted sum of standardised means under minima.

    argmax_p Σ_i w_i (s_p,i − c_i)/d_i subject to s_p,i ≥ b_i; when none qualifies, the nearest:
    argmin_p max_i (b_i − s_p,i)₊/d_i.

    Args:
        weights: [rewards], w, none negative and one above 0; one-hot to maximise one reward.
        minima: b by the reward's index, in that reward's unit.
        centre: [rewards], c, such as the SFT model's means; 0 by default.
        scale: [rewards], d, above 0, such as the standard deviations of the SFT model's scores; 1 by default.
    """
    shares, bounds = finite(weights, "weights"), dict(minima or {})
    rewards = len(shares)
    middle = np.zeros(rewards) if centre is None else finite(centre, "centres")
    spread = np.ones(rewards) if scale is None else finite(scale, "scales")
    if any(array.shape != (rewards,) for array in (middle, spread)):
        raise ValueError(f"expected a centre and a scale for each of {rewards} rewards")
    if (shares < 0).any() or not shares.any():
        raise ValueError(f"expected weights of which none is negative and one above 0, got {shares.tolist()}")
    if (spread <= 0).any():
        raise ValueError(f"expected scales above 0, got {spread.tolist()}")
    if wrong := [index for index in bounds if not 0 <= index < rewards]:
        raise ValueError(f"no reward with index {wrong[0]}; there are {rewards}")
    if not np.isfinite(list(bounds.values())).all():
        raise ValueError(f"expected finite minima, got {bounds}")
    slopes = shares / spread
    return Rule(slopes, float(slopes @ middle), bounds, spread)


def knee(means: ArrayLike) -> int:
    """Return the index of the nondominated point farthest above the plane through the front's extremes.

    For means s, [points, rewards], n_p,i = (s_p,i − nadir_i)/(ideal_i − nadir_i) over the
    nondominated points, 0 where these are equal; the knee is argmax_p Σ_i n_p,i. Of equal sums the
    most even point, with the largest smallest n, is taken.

    Source: Das, "On characterizing the 'knee' of the Pareto curve based on Normal-Boundary
    Intersection", Structural Optimization 18, 1999.
    """
    values = _candidates(means)
    front = np.flatnonzero(nondominated(values))
    worst, best = values[front].min(axis=0), values[front].max(axis=0)
    normalised = (values[front] - worst) / np.where(best > worst, best - worst, 1.0)
    sums, least = normalised.sum(axis=1).round(DECIMALS), normalised.min(axis=1).round(DECIMALS)
    return int(front[np.lexsort([*(-values[front].T[::-1]), -least, -sums])[0]])


def _candidates(means: ArrayLike) -> Array:
    values = finite(means, "candidates, rewards")
    if not len(values):
        raise ValueError("expected a candidate")
    return values

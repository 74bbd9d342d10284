"""Which preference to evaluate next, so that few evaluations show the front."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from rewarded_lines.pareto.approximate_hypervolume import approximate_gains, exact_seconds
from rewarded_lines.pareto.hypervolume import Array, finite, hypervolume

# Weights are proposed in steps of 1/STEPS, four decimals.
STEPS = 10_000
# 0.1 to 0.2 did best on simulated fronts of two and three policies. With 0, noise can close a gap for good;
# with 0.5, three policies' fronts lost up to a sixth of their volume.
SLACK = 0.15
# Seconds of one core that exact potentials may take; beyond, they are approximated.
PATIENCE = 20.0
# Allowed for rounding: a sum of weights off 1, and a gain relative to the hypervolume.
TOLERANCE = 1e-6
ROUNDING = 1e-12
# Points near one end that are looked at first.
_NEAREST = 16


@dataclass(frozen=True)
class Proposal:
    """A preference worth evaluating.

    Attributes:
        weights: one for each policy, with four decimals and a sum of 1.
        potential: an upper bound of the hypervolume that it brings, in the product of the
            rewards' units. It tells when to stop and is no forecast: the middle of a straight
            front of two rewards brings a quarter.
        between: the indices of its two evaluated neighbours.
    """

    weights: tuple[float, ...]
    potential: float
    between: tuple[int, int]


def next_weights(
    weights: ArrayLike,
    means: ArrayLike,
    reference: ArrayLike,
    taken: Sequence[Sequence[float]] = (),
    *,
    min_gap: float = 0.01,
    slack: float = SLACK,
) -> Proposal | None:
    """Return the middle between the two evaluated neighbours where the front may gain most.

    The potential of neighbours a and b is HV(P ∪ {u}; r) − HV(P; r) with u = max(s_a, s_b) + slack · |w_a − w_b|_∞ ·
    (max_P s − min_P s), reward by reward. The maximum is the most that a monotone front could reach between them. The
    slack allows for noisy scores and for merges that beat both ends, and it shrinks with the gap. Without it, a wide
    gap is never entered if one end seems to dominate the other.

    Repeat until `potential` is a small share of the hypervolume, or the budget is spent. In simulations with two
    policies, a grid of as many λ had at most about 1 % less hypervolume. With three policies the search found a sixth
    to a third more with 15 points, a tenth more with 28.

    Args:
        weights: [points, policies], each evaluated preference, on the simplex.
        means: [points, rewards], its mean scores, each reward in its own unit.
        reference: [rewards], such as the SFT model's means; nothing counts below it.
        taken: further preferences not to be proposed, such as those being evaluated.
        min_gap: neighbours whose weights differ by no more are left alone.
        slack: ≥ 0, the share of the scores' range that a unit of weight may gain.

    Returns:
        The proposal, or None when no neighbours are far enough apart or no gain is possible.
        Equal potentials: the widest gap, then the weights in lexical order.

    Raises:
        ValueError: arrays that are not finite or do not fit, fewer than two policies, weights
            off the simplex, or a negative `min_gap` or `slack`.
    """
    places, scores = _checked(weights, means)
    if min_gap < 0 or slack < 0:
        raise ValueError(f"min_gap {min_gap} and slack {slack}; neither may be negative")
    middles = _middles(places, taken, min_gap)
    if not middles:
        return None
    ends = np.array(list(middles))
    gaps = np.abs(places[ends[:, 0]] - places[ends[:, 1]]).max(axis=1, keepdims=True)
    hoped = scores[ends].max(axis=1) + slack * gaps * np.ptp(scores, axis=0)
    start, potentials = _gains(scores, hoped, reference)
    found = [
        Proposal(tuple(part / STEPS for part in middle), potential, pair)
        for (pair, middle), potential in zip(middles.items(), potentials, strict=True)
    ]
    most = max((proposal.potential for proposal in found), default=0.0)
    if most <= ROUNDING * start:
        return None

    def order(proposal: Proposal) -> tuple[float, float, tuple[float, ...]]:
        # Rounded, so that differences in the last bits count as none.
        gap = np.abs(np.subtract(*places[list(proposal.between)])).max()
        return -round(proposal.potential / most, 9), -round(gap, 9), proposal.weights

    return min(found, key=order)


def _middles(places: Array, taken: Sequence[Sequence[float]], min_gap: float) -> dict[tuple[int, int], tuple[int, ...]]:
    """Return the middle between each two neighbours, in steps, unless it is evaluated or taken."""
    known = {rounded(place) for place in [*places, *np.asarray(taken, dtype=np.float64).reshape(-1, places.shape[1])]}
    pairs = _neighbours(places, min_gap)
    middles = {(one, other): rounded((places[one] + places[other]) / 2) for one, other in pairs}
    return {pair: middle for pair, middle in middles.items() if middle not in known}


def _gains(scores: Array, hoped: Array, reference: ArrayLike) -> tuple[float, list[float]]:
    """Return the hypervolume of `scores`, and what each row of `hoped` would add.

    All are exact, or approximated where exact ones take longer than `PATIENCE`.
    """
    if len(hoped) * exact_seconds(len(scores) + 1, scores.shape[1]) <= PATIENCE:
        start = hypervolume(scores, reference)
        return start, [hypervolume(np.vstack([scores, one]), reference) - start for one in hoped]
    sides = scores.max(axis=0) - np.asarray(reference)
    start, gains = approximate_gains(scores, hoped, reference, np.where(sides > 0, sides, 1.0))
    return start, gains.tolist()


def _neighbours(places: Array, min_gap: float) -> Iterator[tuple[int, int]]:
    """Yield the pairs farther apart than `min_gap` with no other point inside the ball that they span.

    These are the edges of the Gabriel graph; with two policies, the consecutive λ. A point with a
    policy that neither end has does not count as between them: otherwise the middle of the simplex
    would hide its edges.

    Source: Gabriel and Sokal, "A New Statistical Approach to Geographic Variation Analysis",
    Systematic Zoology 18, 1969.
    """
    used = places > 0
    for one in range(len(places)):
        apart = places - places[one]
        others = np.flatnonzero(np.abs(apart).max(axis=1) > min_gap + ROUNDING)
        others, near = others[others > one], np.argsort((apart**2).sum(axis=1), kind="stable")[:_NEAREST]
        # The nearest points are between this one and most others; only the rest is compared with all.
        for between in (near, np.arange(len(places))):
            inside = (apart[between] * places[between]).sum(axis=1) - places[others] @ apart[between].T < -ROUNDING
            # [others, between], whether the point in between has a policy that neither end has.
            strange = ~used[others] @ (used[between] & ~used[one]).T
            others = others[~(inside & ~strange).any(axis=1)]
        yield from ((one, other) for other in others.tolist())


def rounded(place: Array) -> tuple[int, ...]:
    """Return weights in steps of 1/STEPS that still sum to 1, by largest remainders; 0 stays 0."""
    exact = place * STEPS
    parts = np.floor(exact + 1e-6).astype(int)
    order = np.argsort(-np.round(exact - parts, 6), kind="stable")
    parts[order[: STEPS - parts.sum()]] += 1
    return tuple(parts.tolist())


def _checked(weights: ArrayLike, means: ArrayLike) -> tuple[Array, Array]:
    places, scores = finite(weights, "points, policies"), finite(means, "points, rewards")
    if places.shape[1] < 2 or len(scores) != len(places):
        shapes = f"shapes {places.shape} and {scores.shape}"
        raise ValueError(f"expected means for each point and two policies or more, got {shapes}")
    if (places < 0).any() or (abs(places.sum(axis=1) - 1) > TOLERANCE).any():
        raise ValueError("weights off the simplex: each must be 0 or more, and every preference must sum to 1")
    return places, scores

"""Between the evaluated λ of two policies: piecewise linear mean scores and their optimum.

A score between two evaluated points is a guess: merged models need not score linearly in λ.
`lams` are [points], two or more, all different, in any order; `means` are [points, rewards].
Functions raise ValueError for arrays that are not finite or do not fit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import ArrayLike

from rewarded_lines.pareto.choice import Choice, Rule
from rewarded_lines.pareto.hypervolume import Array, finite, hypervolume

# Crossings are rounded: a mean this close to its minimum, relative to the largest, counts as on it.
TOLERANCE = 1e-10
DENSE = 2000


@dataclass(frozen=True)
class InterpolatedChoice(Choice):
    """The best λ of a piecewise linear curve, or the nearest when no λ meets every minimum.

    Attributes:
        lam: λ; `index` counts the λ that were tried.
        means: the interpolated mean scores there, each in its reward's unit.
    """

    lam: float
    means: tuple[float, ...]


def interpolate(lams: ArrayLike, means: ArrayLike, lam: ArrayLike) -> Array:
    """Return mean scores at λ, linear between the evaluated neighbours and exact at the evaluated points.

    s(λ) = (1 − t) s_k + t s_(k+1), with t = (λ − λ_k)/(λ_(k+1) − λ_k) and λ_k ≤ λ ≤ λ_(k+1).

    Args:
        lams: [points].
        means: [..., points, rewards].
        lam: within the range of `lams`: a number, for [..., rewards], or [k] numbers, for [..., k, rewards].
    """
    places, values = _curve(lams, means)
    wanted = np.asarray(lam, dtype=np.float64)
    if not ((wanted >= places[0]) & (wanted <= places[-1])).all():
        raise ValueError(f"λ = {wanted.tolist()} lies outside the evaluated {places[0]} … {places[-1]}")
    left = np.clip(np.searchsorted(places, wanted, side="right") - 1, 0, len(places) - 2)
    share = ((wanted - places[left]) / (places[left + 1] - places[left]))[..., None]
    before, after = np.take(values, left, axis=-2), np.take(values, left + 1, axis=-2)
    return np.asarray((1 - share) * before + share * after)


def mixed_hypervolume(lams: ArrayLike, means: ArrayLike, reference: ArrayLike) -> float:
    """Return the hypervolume of the whole piecewise linear curve, not only of its points.

    Every point of the curve can be reached without a merge in between: let the first of two
    neighbouring policies answer a prompt with probability t, else the second. The mean scores
    are then t·s_k + (1 − t)·s_(k+1) exactly. The curve is taken at `DENSE` equal steps of λ and
    at its corners, which gives a little less than the true value.
    """
    places, values = _curve(lams, means)
    tried = np.union1d(places, np.linspace(places[0], places[-1], DENSE + 1))
    return hypervolume(interpolate(places, values, tried), reference)


def best_interpolated(lams: ArrayLike, means: ArrayLike, rule: Rule) -> InterpolatedChoice:
    """Return the exact optimum of a rule, see `weighted_rule`, along the curve.

    argmax_λ Σ_i w_i (s_i(λ) − c_i)/d_i subject to s_i(λ) ≥ b_i; when no λ qualifies,
    argmin_λ max_i (b_i − s_i(λ))₊/d_i. On a segment each of these is linear or a maximum of
    linear functions. The optimum therefore lies at an evaluated λ, where a mean crosses its
    minimum, or where two shortfalls cross; only these λ are tried. Ties are broken as in
    `rewarded_lines.pareto.choice`, then by λ.
    """
    places, values = _curve(lams, means)
    finite(values, "points, rewards")
    tried = np.unique([*places, *_crossings(places, rule.lacks(values) / rule.scale[list(rule.minima)])])
    found = _on_their_minima(interpolate(places, values, tried), rule.minima)
    best = rule.choose(found)
    return InterpolatedChoice(**vars(best), lam=float(tried[best.index]), means=tuple(found[best.index].tolist()))


def _crossings(lams: Array, lacks: Array) -> Iterator[float]:
    """Yield the λ inside segments where one of [points, minima] shortfalls crosses 0 or two cross."""
    pairs = [lacks[:, one] - lacks[:, other] for one, other in combinations(range(lacks.shape[1]), 2)]
    for line in [*lacks.T, *pairs]:
        for start in np.flatnonzero(line[:-1] * line[1:] < 0):
            before, after = line[start], line[start + 1]
            lam = lams[start] + before / (before - after) * (lams[start + 1] - lams[start])
            yield float(np.clip(lam, lams[start], lams[start + 1]))


def _on_their_minima(means: Array, minima: Mapping[int, float]) -> Array:
    """Return `means` with those that miss their minimum by rounding set to it."""
    found = means.copy()
    for reward, bound in minima.items():
        size = max(abs(bound), np.abs(found[:, reward]).max())
        close = np.abs(found[:, reward] - bound) <= TOLERANCE * size
        found[close, reward] = bound
    return found


def _curve(lams: ArrayLike, means: ArrayLike) -> tuple[Array, Array]:
    places, values = finite(lams, "points"), finite(means, "…, points, rewards")
    if len(places) < 2 or values.shape[-2] != len(places):
        raise ValueError(f"expected two λ or more and a mean for each, got shapes {places.shape} and {values.shape}")
    order = np.argsort(places, kind="stable")
    if (np.diff(places[order]) == 0).any():
        raise ValueError(f"λ evaluated twice: {places.tolist()}")
    return places[order], values[..., order, :]

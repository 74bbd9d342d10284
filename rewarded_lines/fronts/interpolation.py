"""Between the evaluated λ of two policies: piecewise linear mean scores and their exact optimum. Pure.

What lies between two evaluated points is a guess to be checked by evaluating it: a merged model's score need not be
linear in λ.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rewarded_lines.fronts.choose import checked_minima, checked_scale, first_choice, linear, shortfalls
from rewarded_lines.fronts.pareto import hypervolume

Array = NDArray[np.float64]
# A mean this close to its minimum, relative to the largest, lies on it: the rounding of a crossing.
TOLERANCE = 1e-10
DENSE = 2000


@dataclass(frozen=True)
class InterpolatedChoice:
    """The best λ of a piecewise linear curve, or the nearest when no λ meets every minimum.

    Attributes:
        lam: λ.
        means: the interpolated mean scores there, each in its reward's unit.
        value: the objective.
        qualifies: whether they meet every minimum.
        shortfalls: by reward with a minimum, how far below it they lie, in the reward's unit; 0 if they do not.
    """

    lam: float
    means: tuple[float, ...]
    value: float
    qualifies: bool
    shortfalls: dict[int, float]


def interpolate(lams: ArrayLike, means: ArrayLike, lam: ArrayLike) -> NDArray[np.float64]:
    """Return mean scores at λ, linear between the evaluated neighbours and exact at the evaluated points.

    s(λ) = (1 − t) s_k + t s_(k+1), with t = (λ − λ_k)/(λ_(k+1) − λ_k) and λ_k ≤ λ ≤ λ_(k+1).

    Args:
        lams: [points], at least two, all different, in any order.
        means: [..., points, rewards].
        lam: a number, or [k] of them, within the range of `lams`.

    Returns:
        [..., rewards] for a number, [..., k, rewards] for several.

    Raises:
        ValueError: arrays that are not finite or do not fit, equal λ, or a λ outside the range.
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
    """Return the hypervolume of the whole piecewise linear curve, not only of its evaluated points.

    Every point of the curve can be had: of two neighbouring policies the first answers a prompt with probability t, the
    second with 1 − t, and the mean scores are t·s_k + (1 − t)·s_(k+1) exactly. Nothing is assumed about merges in
    between. The curve is taken at `DENSE` equal steps of λ beside its corners, from below by as much.

    Args:
        lams: [points], at least two, all different, in any order.
        means: [points, rewards], each reward in its own unit.
        reference: [rewards].

    Raises:
        ValueError: arrays that are not finite or do not fit, or equal λ.
    """
    places, values = _curve(lams, means)
    tried = np.union1d(places, np.linspace(places[0], places[-1], DENSE + 1))
    return hypervolume(interpolate(places, values, tried), reference)


def best_interpolated(
    lams: ArrayLike,
    means: ArrayLike,
    weights: ArrayLike,
    minima: Mapping[int, float] | None = None,
    *,
    centre: ArrayLike | None = None,
    scale: ArrayLike | None = None,
) -> InterpolatedChoice:
    """Return the exact optimum of a linear objective under minima along the piecewise linear curve.

    argmax_λ Σ_i w_i (s_i(λ) − c_i)/d_i subject to s_i(λ) ≥ b_i; when no λ qualifies,
    argmin_λ max_i (b_i − s_i(λ))₊/d_i. On a segment all of these are linear or the largest of linear functions, so
    the optimum lies at an evaluated λ, where a mean crosses its minimum, or where two shortfalls cross: these are
    the λ that are tried, no grid. Of equals the order of `choose` decides, then the smallest λ.

    Args:
        lams: [points], at least two, all different, in any order.
        means: [points, rewards], s, each reward in its own unit.
        weights: [rewards], w, none negative and one above 0; one-hot to maximise one reward.
        minima: by the reward's index, b in that reward's unit.
        centre: [rewards], c; 0 by default.
        scale: [rewards], d, above 0; 1 by default.

    Raises:
        ValueError: arrays that are not finite or do not fit, equal λ, an index without a reward, wrong weights or
            a scale not above 0.
    """
    places, values = _curve(lams, means)
    if values.ndim != 2:
        raise ValueError(f"expected means as [points, rewards], got shape {values.shape}")
    bounds = checked_minima(minima or {}, values.shape[1])
    objective, spread = linear(weights, centre, scale, values.shape[1]), checked_scale(scale, values.shape[1])
    # Signed: above 0 where the mean lies below its minimum.
    lacks = (np.array(list(bounds.values())) - values[:, list(bounds)]) / spread[list(bounds)]
    tried = np.unique([*places, *_crossings(places, lacks)])
    found = _on_their_minima(interpolate(places, values, tried), bounds)
    short = shortfalls(found, bounds)
    index = int(first_choice(found, objective.of(found), short / spread[list(bounds)]))
    return InterpolatedChoice(
        lam=float(tried[index]),
        means=tuple(found[index].tolist()),
        value=float(objective.of(found[index])),
        qualifies=not short[index].any(),
        shortfalls=dict(zip(bounds, short[index].tolist(), strict=True)),
    )


def _crossings(lams: Array, lacks: Array) -> Iterator[float]:
    """Yield the λ inside segments where one of `lacks`, [points, minima], crosses 0 or two of them cross."""
    pairs = [lacks[:, one] - lacks[:, other] for one, other in combinations(range(lacks.shape[1]), 2)]
    for line in [*lacks.T, *pairs]:
        for start in np.flatnonzero(line[:-1] * line[1:] < 0):
            before, after = line[start], line[start + 1]
            lam = lams[start] + before / (before - after) * (lams[start + 1] - lams[start])
            yield float(np.clip(lam, lams[start], lams[start + 1]))


def _on_their_minima(means: Array, minima: Mapping[int, float]) -> Array:
    """Return `means` with those that miss their minimum by rounding put on it."""
    found = means.copy()
    for reward, bound in minima.items():
        size = max(abs(bound), np.abs(found[:, reward]).max())
        close = np.abs(found[:, reward] - bound) <= TOLERANCE * size
        found[close, reward] = bound
    return found


def _curve(lams: ArrayLike, means: ArrayLike) -> tuple[Array, Array]:
    places, values = np.asarray(lams, dtype=np.float64), np.asarray(means, dtype=np.float64)
    if places.ndim != 1 or len(places) < 2 or values.ndim < 2 or values.shape[-2] != len(places):
        raise ValueError(f"expected two λ or more and a mean for each, got shapes {places.shape} and {values.shape}")
    if not (np.isfinite(places).all() and np.isfinite(values).all()):
        raise ValueError("the λ and means are not all finite")
    order = np.argsort(places, kind="stable")
    if (np.diff(places[order]) == 0).any():
        raise ValueError(f"λ evaluated twice: {places.tolist()}")
    return places[order], values[..., order, :]

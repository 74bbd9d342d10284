"""Dominance and hypervolume of points to be maximised. Pure: arrays in, new values out."""

from __future__ import annotations

import moocore
import numpy as np
from numpy.typing import ArrayLike, NDArray


def nondominated(points: ArrayLike) -> NDArray[np.bool_]:
    """Return which points no other point dominates, when every reward is maximised.

    p dominates q when p_i ≥ q_i for every reward i and p_i > q_i for one. Equal points do not dominate each
    other, so all copies of a nondominated point are kept.

    Args:
        points: [points, rewards], each reward in its own unit.

    Returns:
        A mask, [points].

    Raises:
        ValueError: `points` is not a finite array of that shape.
    """
    values = _checked(points)
    if not len(values):
        return np.zeros(0, dtype=np.bool_)
    return np.asarray(moocore.is_nondominated(values, maximise=True, keep_weakly=True), dtype=np.bool_)


def hypervolume(points: ArrayLike, reference: ArrayLike) -> float:
    """Return the volume that `points` dominate above `reference`, when every reward is maximised.

    HV(P; r) = Λ( ⋃_{p ∈ P, p > r} [r_1, p_1] × … × [r_m, p_m] ), Λ the Lebesgue measure. A point that is not
    better than the reference on every reward adds nothing. Computed exactly by moocore.

    Source: Zitzler and Thiele, "Multiobjective Evolutionary Algorithms: A Comparative Case Study and the
    Strength Pareto Approach", IEEE Transactions on Evolutionary Computation 3(4), 1999.

    Args:
        points: [points, rewards], each reward in its own unit.
        reference: [rewards], in the same units.

    Returns:
        The hypervolume, in the product of the rewards' units; 0 for no points.

    Raises:
        ValueError: the arrays are not finite, or their shapes do not fit.
    """
    values = _checked(points)
    origin = np.asarray(reference, dtype=np.float64)
    if origin.shape != values.shape[1:]:
        raise ValueError(f"reference of shape {origin.shape} for points with {values.shape[1]} rewards")
    if not np.isfinite(origin).all():
        raise ValueError("the reference is not finite")
    above = values[(values > origin).all(axis=1)]
    return float(moocore.hypervolume(above, ref=origin, maximise=True)) if len(above) else 0.0


def hypervolumes(fronts: ArrayLike, references: ArrayLike) -> NDArray[np.float64]:
    """Return `hypervolume` of each front above its own reference.

    Args:
        fronts: [samples, points, rewards].
        references: [samples, rewards].

    Returns:
        [samples], in the product of the rewards' units.

    Raises:
        ValueError: the shapes do not fit, or a number is not finite.
    """
    pairs = zip(np.asarray(fronts), np.asarray(references), strict=True)
    return np.array([hypervolume(points, reference) for points, reference in pairs], dtype=np.float64)


def _checked(points: ArrayLike) -> NDArray[np.float64]:
    values = np.asarray(points, dtype=np.float64)
    if values.ndim != 2 or values.shape[1] == 0:
        raise ValueError(f"expected [points, rewards], got an array of shape {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError("the points are not all finite")
    return values

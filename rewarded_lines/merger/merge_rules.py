"""The rules of the merge methods: pure functions that join residuals, without files or state.

A rule takes the residuals τ_i = θ_i − θ_base of the policies, float64 arrays of one shape, the weights λ_i, and its
parameters by name. It returns the merged residual, value by value, so that tensors can pass in blocks. Arrays are
numpy's or torch's: rules only use operators that both have. Measures of whole tensors come as parameters, see
`Method.needs`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

# A float64 array of numpy or torch.
Array = Any
Rule = Callable[..., Array]

# Above this cosine residuals are joined linearly: parallel residuals span no plane to rotate in.
_PARALLEL = 0.9995


def soup(residuals: Sequence[Array], weights: Sequence[float]) -> Array:
    """Return Σ λ_i·τ_i: Rewarded Soups, Task Arithmetic, model soups and WiSE-FT, according to the weights.

    Source: Rewarded Soups, arXiv 2306.04488, section 2.2; Task Arithmetic, arXiv 2212.04089, section 2.
    """
    total = residuals[0] * weights[0]
    for residual, weight in zip(residuals[1:], weights[1:], strict=True):
        total = total + residual * weight
    return total


def ties(residuals: Sequence[Array], weights: Sequence[float], *, thresholds: Sequence[float], join: str) -> Array:
    """Return the TIES merge: trim small values, elect a sign by weight, join the values of that sign.

    With τ̂_i = τ_i where |τ_i| ≥ t_i, else 0, and γ = sgn Σ λ_i·τ̂_i, A the policies with sgn τ̂_i = γ:
    Σ_A λ_i·τ̂_i / Σ_A λ_i (join "mean") or Σ_A λ_i·τ̂_i (join "sum"); 0 where γ = 0.

    Args:
        residuals: τ_i.
        weights: λ_i.
        thresholds: t_i, one for each policy.
        join: "mean" or "sum".

    Source: TIES-Merging, arXiv 2306.01708, section 4.2. The paper has equal weights.
    """
    kept = [residual * (abs(residual) >= limit) for residual, limit in zip(residuals, thresholds, strict=True)]
    return _join_agreeing(kept, weights, join)


def dare(residuals: Sequence[Array], weights: Sequence[float], *, kept: Sequence[Array], density: float) -> Array:
    """Return Σ λ_i·m_i·τ_i/d: values are dropped at random, the others divided by d to keep the mean.

    Args:
        residuals: τ_i.
        weights: λ_i.
        kept: m_i, boolean arrays, true with probability d.
        density: d.

    Source: DARE, arXiv 2311.03099, section 3.1, with drop rate p = 1 − d.
    """
    return soup(_dropped(residuals, kept, density), weights)


def dare_ties(
    residuals: Sequence[Array], weights: Sequence[float], *, kept: Sequence[Array], density: float, join: str
) -> Array:
    """Return DARE's residuals joined as in TIES: a sign is elected by weight, and values of that sign are joined.

    Source: DARE, arXiv 2311.03099, section 4; TIES-Merging, arXiv 2306.01708, section 4.2.
    """
    return _join_agreeing(_dropped(residuals, kept, density), weights, join)


def consensus(residuals: Sequence[Array], weights: Sequence[float], *, tall: float, agree: int) -> Array:
    """Return Σ λ_i·τ_i where at least k policies need the value, else 0: Consensus merging with TALL masks.

    Policy i needs a value if |τ_i| ≥ μ·|Σ_j τ_j − τ_i|. The masks depend on the unweighted residuals of all
    policies, so they are the same for every λ.

    Args:
        residuals: τ_i.
        weights: λ_i.
        tall: μ ≥ 0 (the paper's λ_t).
        agree: k; 2 drops the values that no policy or only one needs.

    Source: Localizing Task Information for Improved Model Merging, arXiv 2405.07813, sections 4 and 5.
    """
    total = soup(residuals, [1.0] * len(residuals))
    needed = sum((abs(residual) >= tall * abs(total - residual)) * 1.0 for residual in residuals)
    return soup(residuals, weights) * (needed >= agree)


def slerp_weights(weights: Sequence[float], gram: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """Return the factors of spherical interpolation between two residual tensors.

    sin(λ_i·Ω)/sin Ω with Ω the angle between τ_1 and τ_2; λ_i if one is zero or they are nearly parallel.

    Args:
        weights: λ and 1 − λ.
        gram: the 2 × 2 scalar products τ_i·τ_j of the whole tensors.

    Source: Shoemake, Animating rotation with quaternion curves, SIGGRAPH 1985, section 3.3.
    """
    norm = math.sqrt(gram[0][0]) * math.sqrt(gram[1][1])
    cosine = max(-1.0, min(1.0, gram[0][1] / norm)) if norm > 0 else 1.0
    if abs(cosine) > _PARALLEL:
        return tuple(weights)
    angle = math.acos(cosine)
    # The ends are exact, so that λ = 1 gives the policy bit for bit.
    return tuple(w if w in (0.0, 1.0) else math.sin(w * angle) / math.sin(angle) for w in weights)


def _dropped(residuals: Sequence[Array], kept: Sequence[Array], density: float) -> list[Array]:
    return [residual * mask / density for residual, mask in zip(residuals, kept, strict=True)]


def _join_agreeing(residuals: Sequence[Array], weights: Sequence[float], join: str) -> Array:
    elected = soup(residuals, weights)
    # Weights may be negative when extrapolating, so the sign of the weighted value counts.
    agrees = [
        (residual * weight > 0) & (elected > 0) | (residual * weight < 0) & (elected < 0)
        for residual, weight in zip(residuals, weights, strict=True)
    ]
    total = soup([residual * mask for residual, mask in zip(residuals, agrees, strict=True)], weights)
    if join == "sum":
        return total
    # Adding to float64 zeros: in torch, a boolean array times a number is float32.
    share = elected * 0.0
    for mask, weight in zip(agrees, weights, strict=True):
        share = share + (elected * 0.0 + mask) * abs(weight)
    return total / (share + (share == 0))

"""The rules of the merge methods: pure functions that join residuals, without files or state.

A rule takes the residuals τ_i = θ_i − θ_base of the policies, float64 arrays of one shape, the weights λ_i, and its
parameters by name. It returns the merged residual, value by value, so that tensors can pass in blocks. Arrays are
numpy's or torch's: rules only use operators that both have. Measures of whole tensors come as parameters, see
`Method.measure`.
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
    return _join(kept, weights, join)


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
    return _join(_dropped(residuals, kept, density), weights, join)


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


def ram(residuals: Sequence[Array], weights: Sequence[float], *, changed: float) -> Array:
    """Return the RAM merge: values that several policies changed are averaged, those of one policy are kept.

    With A the policies whose |τ_i| > ε: Σ_A ρ_i·τ_i / Σ_A |ρ_i| where A has several, ρ_i·τ_i where it has one policy, 0
    where none. A single policy has nothing to share, and is kept whole. See `ram_plus`.
    """
    return ram_plus(residuals, weights, changed=changed, boosts=[0.0] * len(residuals))


def ram_plus(residuals: Sequence[Array], weights: Sequence[float], *, changed: float, boosts: Sequence[float]) -> Array:
    """Return the RAM+ merge: RAM, with the values that only policy i changed times 1 + b_i.

    b_i = r·min(q_i, α), q_i the number of values that policy i changed together with others, divided by the number of
    those that it alone changed.

    Args:
        residuals: τ_i.
        weights: ρ_i, 1 for every policy in the paper.
        changed: ε.
        boosts: b_i.

    Source: Reinforced Agent Merging, arXiv 2601.13572.
    """
    if len(residuals) == 1:
        return residuals[0] * weights[0]
    # 1 everywhere, also for NaN. In torch, a boolean array times a number is float32, times an array it is float64.
    one = residuals[0] ** 0
    masks = [one * (abs(residual) > changed) for residual in residuals]
    count = soup(masks, [1.0] * len(masks))
    several, alone = count > 1, one * (count <= 1)
    kept = [
        residual * mask * (one + alone * boost) for residual, mask, boost in zip(residuals, masks, boosts, strict=True)
    ]
    size = soup(masks, [abs(weight) for weight in weights])
    return soup(kept, weights) / (alone + size * several)


def sce(residuals: Sequence[Array], weights: Sequence[float], *, least: float, squares: Sequence[float]) -> Array:
    """Return the SCE merge: select values by their variance, weigh policies by their squares, erase minority signs.

    τ̂_i = τ_i where the spread over policies is at least t, else 0; then the mean of TIES' election, where policy i
    counts ρ_i·η_i.

    Args:
        residuals: τ_i of all policies, those of weight 0, too.
        weights: ρ_i, 1 for every policy in the paper.
        least: t, see `spread`.
        squares: η_i = Σ τ̂_i² / Σ_j Σ τ̂_j² of the whole tensor.

    Source: FuseChat, arXiv 2408.07990, section 3.3.
    """
    selected = spread(residuals) >= least
    shares = [weight * square for weight, square in zip(weights, squares, strict=True)]
    return _join([residual * selected for residual in residuals], weights, "mean", shares)


def spread(residuals: Sequence[Array]) -> Array:
    """Return Σ_i (N·τ_i − Σ_j τ_j)², which is N³ times the variance over the N policies, without a division."""
    total = soup(residuals, [1.0] * len(residuals))
    steps = [residual * len(residuals) - total for residual in residuals]
    return soup([step * step for step in steps], [1.0] * len(steps))


def della(residuals: Sequence[Array], weights: Sequence[float], *, kept: Sequence[Array], join: str) -> Array:
    """Return the DELLA merge: values are dropped at random, small ones more often; the rest is enlarged and joined.

    Args:
        residuals: τ_i.
        weights: λ_i.
        kept: m_i/k_i, with m_i 1 with probability k_i, else 0.
        join: "mean" or "sum" of the elected sign as in TIES, or "all" values.

    Source: DELLA-Merging, arXiv 2406.11617, section 3, with drop rates p_i = 1 − k_i.
    """
    return _join([residual * mask for residual, mask in zip(residuals, kept, strict=True)], weights, join)


def breadcrumbs(
    residuals: Sequence[Array], weights: Sequence[float], *, lower: Sequence[float], upper: Sequence[float], join: str
) -> Array:
    """Return the Breadcrumbs merge: neither the smallest values nor the outliers of each residual are joined.

    Args:
        residuals: τ_i.
        weights: λ_i.
        lower: the smallest |τ_i| that is kept.
        upper: the largest.
        join: "all" values as in the paper, or "mean" or "sum" of the elected sign as in TIES.

    Source: Model Breadcrumbs, arXiv 2312.06795, section 3.
    """
    kept = [
        residual * ((abs(residual) >= low) & (abs(residual) <= high))
        for residual, low, high in zip(residuals, lower, upper, strict=True)
    ]
    return _join(kept, weights, join)


def relative(weights: Sequence[float]) -> tuple[float, ...]:
    """Return ρ_i = λ_i / max_j |λ_j|, the weights for methods whose paper has none; all 0 if every λ is."""
    most = max((abs(weight) for weight in weights), default=0.0)
    return tuple(weight / most if most else 0.0 for weight in weights)


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


def _join(
    residuals: Sequence[Array], weights: Sequence[float], join: str, shares: Sequence[float] | None = None
) -> Array:
    """Join all values ("all"), or those of the elected sign, by their sum or mean; `shares` weigh the mean."""
    elected = soup(residuals, weights)
    if join == "all":
        return elected
    # Weights may be negative when extrapolating, so the sign of the weighted value counts.
    agrees = [
        (residual * weight > 0) & (elected > 0) | (residual * weight < 0) & (elected < 0)
        for residual, weight in zip(residuals, weights, strict=True)
    ]
    shares = weights if shares is None else shares
    total = soup([residual * mask for residual, mask in zip(residuals, agrees, strict=True)], shares)
    if join == "sum":
        return total
    # Adding to float64 zeros: in torch, a boolean array times a number is float32.
    share = elected * 0.0
    for mask, weight in zip(agrees, shares, strict=True):
        share = share + (elected * 0.0 + mask) * abs(weight)
    return total / (share + (share == 0))

"""Merge methods: each a pure function on residuals, and one row of `METHODS`. No files, no state.

A rule takes the residuals τ_i = θ_i − θ_base of the policies, float64 arrays of one shape (numpy's or torch's: rules
use nothing but operators, which both have), the weights λ_i, and its parameters by name. It returns the merged
residual, value by value, so that tensors can pass in blocks. What a rule must know beyond its block is measured
first, and comes as a further parameter; see `Method.needs`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rewarded_lines.errors import Problem, UserError, did_you_mean, fail

# A float64 array of numpy or torch.
Array = Any
Rule = Callable[..., Array]
OptionValue = float | int | str

# Nearly parallel residuals have no plane to rotate in; the customary limit.
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
    """Return the TIES merge: trim small values, elect a sign by weight, join the values that agree with it.

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
    """Return Σ λ_i·m_i·τ_i/d: values are dropped at random, the rest is enlarged to keep the mean.

    Args:
        residuals: τ_i.
        weights: λ_i.
        kept: m_i, boolean arrays, true with probability d.
        density: d.

    Source: DARE, arXiv 2311.03099, section 3.1, with drop rate p = 1 − d.
    """
    return soup([_rescale(*pair, density) for pair in zip(residuals, kept, strict=True)], weights)


def dare_ties(
    residuals: Sequence[Array], weights: Sequence[float], *, kept: Sequence[Array], density: float, join: str
) -> Array:
    """Return DARE's residuals joined as TIES joins them: a sign elected by weight, the values that agree with it.

    Source: DARE, arXiv 2311.03099, section 4; TIES-Merging, arXiv 2306.01708, section 4.2.
    """
    return _join_agreeing([_rescale(*pair, density) for pair in zip(residuals, kept, strict=True)], weights, join)


def consensus(residuals: Sequence[Array], weights: Sequence[float], *, tall: float, agree: int) -> Array:
    """Return Σ λ_i·τ_i where at least k policies need the value, else 0: Consensus merging with TALL masks.

    Policy i needs a value where |τ_i| ≥ μ·|Σ_j τ_j − τ_i|. The masks look at the unweighted residuals of all
    policies, so they are the same for every λ.

    Args:
        residuals: τ_i.
        weights: λ_i.
        tall: μ ≥ 0, how large a policy's own part must be beside the others' (the paper's λ_t).
        agree: k; 2 prunes what no policy and what only one needs.

    Source: Localizing Task Information for Improved Model Merging, arXiv 2405.07813, sections 4 and 5.
    """
    total = soup(residuals, [1.0] * len(residuals))
    needed = sum((abs(residual) >= tall * abs(total - residual)) * 1.0 for residual in residuals)
    return soup(residuals, weights) * (needed >= agree)


def slerp_weights(weights: Sequence[float], gram: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """Return the factors of spherical interpolation between two residual tensors.

    sin(λ_i·Ω)/sin Ω with Ω the angle between τ_1 and τ_2; λ_i themselves where they are zero or nearly parallel.

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
    return tuple(_slerp_weight(weight, angle) for weight in weights)


def _slerp_weight(weight: float, angle: float) -> float:
    # The ends are exact, so that λ = 1 gives the policy bit for bit.
    return weight if weight in (0.0, 1.0) else math.sin(weight * angle) / math.sin(angle)


def _rescale(residual: Array, kept: Array, density: float) -> Array:
    return residual * kept / density


def _join_agreeing(residuals: Sequence[Array], weights: Sequence[float], join: str) -> Array:
    elected = soup(residuals, weights)
    # Weights may be negative when extrapolating: it is the weighted value whose sign counts.
    agrees = [
        (residual * weight > 0) & (elected > 0) | (residual * weight < 0) & (elected < 0)
        for residual, weight in zip(residuals, weights, strict=True)
    ]
    total = soup([residual * mask for residual, mask in zip(residuals, agrees, strict=True)], weights)
    if join == "sum":
        return total
    # Begun as a float64 array: torch makes float32 of a boolean one times a number.
    share = elected * 0.0
    for mask, weight in zip(agrees, weights, strict=True):
        share = share + (elected * 0.0 + mask) * abs(weight)
    return total / (share + (share == 0))


@dataclass(frozen=True)
class Option:
    """A parameter the user may set: its default, its range or its choices, and a line of help."""

    default: OptionValue
    help: str
    low: float = -math.inf
    high: float = math.inf
    choices: tuple[str, ...] = ()
    above_low: bool = False

    def check(self, value: OptionValue) -> str:
        """Return what was expected of `value`, or "" when it is right."""
        if self.choices:
            return "" if value in self.choices else " or ".join(self.choices)
        whole = isinstance(self.default, int)
        kind = "a whole number" if whole else "a number"
        bounds = f"{kind} {'>' if self.above_low else '≥'} {self.low:g}" + (
            f" and ≤ {self.high:g}" if self.high < math.inf else ""
        )
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
            return bounds
        inside = (self.low < value if self.above_low else self.low <= value) and value <= self.high
        return "" if inside else bounds


@dataclass(frozen=True)
class Method:
    """One row of the table of methods.

    Attributes:
        rule: the pure function on residuals.
        summary: one line for `--help`.
        options: what the user may set, passed to the rule by name (but see `scope`, which says how to measure).
        needs: what is measured or drawn before the rule can run, and under which name it comes:
            "thresholds" for each policy, "kept" masks, or the "gram" matrix that `weigh` takes.
        weigh: turns the user's weights into the rule's, tensor by tensor.
        weights: "simplex" (≥ 0, sum 1), "free" (any), "share" (each in 0 … 1), or "none" (the method sets them).
        policies: the only number of policies it takes; 0 for any.
    """

    rule: Rule
    summary: str
    options: Mapping[str, Option] = field(default_factory=dict)
    needs: Literal["", "thresholds", "kept", "gram"] = ""
    weigh: Callable[[Sequence[float], Sequence[Sequence[float]]], tuple[float, ...]] | None = None
    weights: Literal["simplex", "free", "share", "none"] = "simplex"
    policies: int = 0

    def copies(self, options: Mapping[str, OptionValue], weights: Sequence[float]) -> int | None:
        """Return which policy's residual the merged residual is, value for value and times its weight, or None.

        Such a tensor can be copied, bit for bit, where the schedule's scale times the weight is 1.
        """
        active = [index for index, weight in enumerate(weights) if weight != 0]
        if len(active) != 1:
            return None
        kept_whole = options.get("density", 1) == 1 and (options.get("join") != "mean" or weights[active[0]] == 1)
        # A policy alone needs all its values.
        unpruned = options.get("agree", 0) <= (1 if len(weights) == 1 else 0)  # type: ignore[operator]
        return active[0] if kept_whole and unpruned else None


_DENSITY = "share of each residual that is kept"
_JOIN = Option("mean", "how values of the elected sign are joined", choices=("mean", "sum"))
METHODS: Mapping[str, Method] = {
    "soup": Method(soup, "Σ λᵢτᵢ: Rewarded Soups, with --alpha --beta LiNeS; one policy: single-task LiNeS"),
    "wise-ft": Method(soup, "one policy, interpolated towards the base: λτ", weights="share", policies=1),
    "task-arithmetic": Method(soup, "Σ λᵢτᵢ with any weights, e.g. --lam 1,1", weights="free"),
    "uniform": Method(soup, "uniform model soup: the mean of all residuals", weights="none"),
    "greedy": Method(soup, "greedy model soup: policies join while --score does not fall", weights="none"),
    "slerp": Method(
        soup, "two residuals, interpolated on the sphere tensor by tensor", {}, "gram", slerp_weights, policies=2
    ),
    "ties": Method(
        ties,
        "TIES: trim, elect a sign, join what agrees",
        {
            "density": Option(0.2, _DENSITY, low=0, high=1, above_low=True),
            "scope": Option(
                "model", "trim by magnitude over the whole model or each tensor", choices=("model", "tensor")
            ),
            "join": _JOIN,
        },
        "thresholds",
    ),
    "dare": Method(
        dare,
        "DARE: drop values at random, enlarge the rest, then Σ λᵢτᵢ",
        {
            "density": Option(0.1, _DENSITY, low=0, high=1, above_low=True),
            "seed": Option(0, "of the random masks", low=0),
        },
        "kept",
    ),
    "dare-ties": Method(
        dare_ties,
        "DARE's dropping, then TIES's election",
        {
            "density": Option(0.1, _DENSITY, low=0, high=1, above_low=True),
            "seed": Option(0, "of the random masks", low=0),
            "join": _JOIN,
        },
        "kept",
    ),
    "consensus": Method(
        consensus,
        "Consensus: keep Σ λᵢτᵢ where k policies need it (TALL masks)",
        {
            "tall": Option(0.4, "how large a policy's part must be beside the others'", low=0),
            "agree": Option(2, "k, how many policies must need a value", low=0),
        },
    ),
}


def check_method(method: str, options: Mapping[str, OptionValue], policies: int) -> dict[str, OptionValue]:
    """Return all options of a method, the given ones checked and the defaults filled in.

    Args:
        method: a key of `METHODS`.
        options: what the user set.
        policies: how many policies there are.

    Raises:
        UserError: no such method, an option that is not the method's or out of range, a wrong number of policies.
    """
    if method not in METHODS:
        remedy = did_you_mean(method, METHODS)
        raise fail(f"unknown value `{method}`", where="--method", expected=", ".join(METHODS), remedy=remedy)
    row = METHODS[method]
    problems = [_check_option(method, row, name, value) for name, value in options.items()]
    if row.policies and policies != row.policies:
        count = f"{row.policies} {'policy' if row.policies == 1 else 'policies'}"
        problems.append(
            Problem(f"the method {method} takes {count}", "--policy", got=f"{policies}", remedy="choose another")
        )
    if found := [problem for problem in problems if problem]:
        raise UserError(found)
    return {name: options.get(name, option.default) for name, option in row.options.items()}


def _check_option(method: str, row: Method, name: str, value: OptionValue) -> Problem | None:
    if name not in row.options:
        known = ", ".join(f"--{key}" for key in row.options) or "none"
        return Problem(f"not an option of {method}", where=f"--{name}", expected=known, got=str(value))
    expected = row.options[name].check(value)
    return Problem("out of range", where=f"--{name}", expected=expected, got=str(value)) if expected else None

"""What a card says of a method: its equation, and the papers it comes from."""

from __future__ import annotations

from typing import Any

from rewarded_lines.rules.spec import MergeSpec

_TIES = "τ̂ᵢ = τᵢ where |τᵢ| is among the largest {density:g} of {scope}, else 0"
_JOINS = {"mean": "Σ_A λᵢ τ̂ᵢ / Σ_A λᵢ", "sum": "Σ_A λᵢ τ̂ᵢ"}
_ELECTED = "A: the policies where τ̂ᵢ has the sign of Σ λᵢ τ̂ᵢ, value by value"
_SCOPES = {"model": "the whole residual", "tensor": "its tensor"}

_LINES = ("LiNeS: Post-training Layer Scaling Prevents Forgetting and Enhances Model Merging", "2410.17146")
_SOUPS = (
    "Rewarded soups: towards Pareto-optimal alignment by interpolating weights fine-tuned on diverse rewards",
    "2306.04488",
)
_MODEL_SOUPS = (
    "Model soups: averaging weights of multiple fine-tuned models improves accuracy without increasing inference time",
    "2203.05482",
)
_TIES_PAPER = ("TIES-Merging: Resolving Interference When Merging Models", "2306.01708")
_DARE_PAPER = (
    "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch",
    "2311.03099",
)
_PAPERS = {
    "wise-ft": (("Robust fine-tuning of zero-shot models", "2109.01903"),),
    "task-arithmetic": (("Editing Models with Task Arithmetic", "2212.04089"),),
    "uniform": (_MODEL_SOUPS,),
    "greedy": (_MODEL_SOUPS,),
    "ties": (_TIES_PAPER,),
    "dare": (_DARE_PAPER,),
    "dare-ties": (_DARE_PAPER, _TIES_PAPER),
    "consensus": (("Localizing Task Information for Improved Model Merging and Compression", "2405.07813"),),
}


def equation(spec: MergeSpec) -> list[str]:
    """Return the merged residual m as a function of the residuals τᵢ, one line for each part of it."""
    options: dict[str, Any] = dict(spec.options)
    drawn = "mᵢ: random masks that keep a value with probability {density:g} (seed {seed})"
    if spec.method == "ties":
        kept = _TIES.format(density=options["density"], scope=_SCOPES[options["scope"]])
        return [f"m = {_JOINS[options['join']]}", kept, _ELECTED]
    if spec.method == "dare":
        return ["m = Σ λᵢ mᵢ τᵢ / {density:g}".format(**options), drawn.format(**options)]
    if spec.method == "dare-ties":
        kept = "τ̂ᵢ = mᵢ τᵢ / {density:g}".format(**options)
        return [f"m = {_JOINS[options['join']]}", kept, drawn.format(**options), _ELECTED]
    if spec.method == "consensus":
        needed = "where |τᵢ| ≥ {tall:g} |Σⱼ τⱼ − τᵢ| for at least {agree} policies, else 0"
        return ["m = Σ λᵢ τᵢ " + needed.format(**options)]
    if spec.method == "slerp":
        return ["m = Σ sin(λᵢ Ω)/sin Ω τᵢ", "Ω: the angle between τ₁ and τ₂, tensor by tensor"]
    return ["m = Σ λᵢ τᵢ"]


def papers(spec: MergeSpec) -> list[tuple[str, str]]:
    """Return title and arXiv number of what a merge rests on: LiNeS where there is a schedule, soups, the method."""
    lines = [_LINES] if spec.scaled else []
    return [*lines, _SOUPS, *_PAPERS.get(spec.method, ())]

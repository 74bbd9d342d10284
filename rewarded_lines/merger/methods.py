"""The table of merge methods. A row has everything the project knows about a method; a new method is a new row.

Command line, project files, model cards, legends and the documents' tables are made from the rows, or tested against
them. The rules themselves are in `merge_rules.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from rewarded_lines.errors import Problem, UserError, did_you_mean, fail
from rewarded_lines.merger.merge_rules import (
    breadcrumbs,
    consensus,
    dare,
    dare_ties,
    della,
    ram,
    ram_plus,
    sce,
    slerp_weights,
    soup,
    spread,
    ties,
)
from rewarded_lines.merger.method_row import Method, Option, OptionValue


def _random_masks(facts: Any, name: str, rows: Sequence[int], options: Mapping[str, Any]) -> dict[str, Any]:
    return {"kept": facts.random_masks(name, rows, options["density"], options["seed"])}


def _window_fits(options: Mapping[str, Any]) -> str:
    """Return what DELLA's options must be together, or "" if all probabilities are above 0 and at most 1."""
    density, half = options["density"], options["window"] / 2
    inside = density > half and density + half < 1 + 1e-12
    return "" if density == 1 or inside else "--density − --window/2 above 0, and --density + --window/2 at most 1"


def _keeps_elected(options: Mapping[str, Any], weights: Sequence[float]) -> bool:
    """True if all values are kept, and a mean over one policy does not cancel its weight."""
    return bool(options["density"] == 1) and (options["join"] != "mean" or sum(weights) == 1)


_DENSITY = "share of each residual that is kept"
_DROPPED = Option(0.1, _DENSITY, low=0, high=1, above_low=True)
_SEED = Option(0, "of the random masks", low=0)
_JOIN = Option(
    "mean",
    "how values of the elected sign are joined",
    choices={"mean": "Σ_A λᵢ τ̂ᵢ / Σ_A λᵢ", "sum": "Σ_A λᵢ τ̂ᵢ"},
)
_JOIN_ANY = {**_JOIN.choices, "all": "Σ λᵢ τ̂ᵢ"}
_SCOPE = Option(
    "model",
    "measure over the whole model or each tensor",
    choices={"model": "the whole residual", "tensor": "its tensor"},
)
_ELECTED = "A: the policies where τ̂ᵢ has the sign of Σ λᵢ τ̂ᵢ, value by value"
_CHANGED = Option(1e-5, "values of a residual up to this size count as unchanged", low=0)
_SHARED = "m = Σ_A ρᵢ τᵢ / Σ_A |ρᵢ| where several policies are in A, 0 where none is"
_CHANGERS = "A: the policies with |τᵢ| > {changed}, value by value"
_RELATIVE = "ρᵢ = λᵢ / maxⱼ |λⱼ|"
_DRAWN = "mᵢ: random masks that keep a value with probability {density} (seed {seed})"
LINES_PAPER = ("LiNeS: Post-training Layer Scaling Prevents Forgetting and Enhances Model Merging", "2410.17146")
SOUPS_PAPER = (
    "Rewarded soups: towards Pareto-optimal alignment by interpolating weights fine-tuned on diverse rewards",
    "2306.04488",
)
_MODEL_SOUPS = (
    "Model soups: averaging weights of multiple fine-tuned models improves accuracy without increasing inference time",
    "2203.05482",
)
_TIES = ("TIES-Merging: Resolving Interference When Merging Models", "2306.01708")
_RAM = ("Behavior Knowledge Merge in Reinforced Agentic Models", "2601.13572")
_DARE = ("Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch", "2311.03099")

METHODS: Mapping[str, Method] = {
    "soup": Method(soup, "Σ λᵢτᵢ: Rewarded Soups, with --alpha --beta LiNeS; one policy: single-task LiNeS"),
    "wise-ft": Method(
        soup,
        "one policy, interpolated towards the base: λτ",
        "WiSE-FT",
        papers=(("Robust fine-tuning of zero-shot models", "2109.01903"),),
        weights="share",
        policies=1,
    ),
    "task-arithmetic": Method(
        soup,
        "Σ λᵢτᵢ with any weights, e.g. --lam 1,1",
        "Task Arithmetic",
        papers=(("Editing Models with Task Arithmetic", "2212.04089"),),
        weights="free",
    ),
    "uniform": Method(soup, "uniform model soup: the mean of all residuals", papers=(_MODEL_SOUPS,), weights="none"),
    "greedy": Method(
        soup,
        "greedy model soup: policies join while --score does not fall",
        papers=(_MODEL_SOUPS,),
        weights="none",
    ),
    "slerp": Method(
        soup,
        "two residuals, interpolated on the sphere tensor by tensor",
        "SLERP",
        ("m = Σ sin(λᵢ Ω)/sin Ω τᵢ", "Ω: the angle between τ₁ and τ₂, tensor by tensor"),
        weigh=slerp_weights,
        policies=2,
    ),
    "ties": Method(
        ties,
        "TIES: trim, elect a sign, join what agrees",
        "TIES",
        ("m = {join}", "τ̂ᵢ = τᵢ where |τᵢ| is among the largest {density} of {scope}, else 0", _ELECTED),
        (_TIES,),
        {"density": Option(0.2, _DENSITY, low=0, high=1, above_low=True), "scope": _SCOPE, "join": _JOIN},
        lambda facts, name, rows, options: facts.thresholds(name, rows, options["density"], options["scope"]),
        keeps=_keeps_elected,
    ),
    "dare": Method(
        dare,
        "DARE: drop values at random, enlarge the rest, then Σ λᵢτᵢ",
        "DARE",
        ("m = Σ λᵢ mᵢ τᵢ / {density}", _DRAWN),
        (_DARE,),
        {"density": _DROPPED, "seed": _SEED},
        _random_masks,
        keeps=lambda options, weights: bool(options["density"] == 1),
    ),
    "dare-ties": Method(
        dare_ties,
        "DARE's dropping, then TIES's election",
        "DARE-TIES",
        ("m = {join}", "τ̂ᵢ = mᵢ τᵢ / {density}", _DRAWN, _ELECTED),
        (_DARE, _TIES),
        {"density": _DROPPED, "seed": _SEED, "join": _JOIN},
        _random_masks,
        keeps=_keeps_elected,
    ),
    "consensus": Method(
        consensus,
        "Consensus: keep Σ λᵢτᵢ where k policies need it (TALL masks)",
        "Consensus",
        ("m = Σ λᵢ τᵢ where |τᵢ| ≥ {tall} |Σⱼ τⱼ − τᵢ| for at least {agree} policies, else 0",),
        (("Localizing Task Information for Improved Model Merging and Compression", "2405.07813"),),
        {
            "tall": Option(0.4, "how large a policy's part must be beside the others'", low=0),
            "agree": Option(2, "k, how many policies must need a value", low=0),
        },
        everyone=True,
        # A single policy needs all its values.
        keeps=lambda options, weights: bool(options["agree"] <= (1 if len(weights) == 1 else 0)),
    ),
    "sum": Method(
        soup,
        "raw sum: Στᵢ at equal λ, and at a corner one policy",
        "Raw sum",
        ("m = Σ ρᵢ τᵢ", _RELATIVE),
        (("Editing Models with Task Arithmetic", "2212.04089"),),
        relative=True,
    ),
    "ram": Method(
        ram,
        "RAM: average what several policies changed, keep what only one changed",
        "RAM",
        (_SHARED, "m = ρᵢ τᵢ where only policy i is in A", _CHANGERS, _RELATIVE),
        (_RAM,),
        {"changed": _CHANGED},
        relative=True,
        keeps=lambda options, weights: True,
    ),
    "ram-plus": Method(
        ram_plus,
        "RAM+: RAM, and what only one policy changed is enlarged",
        "RAM+",
        (
            _SHARED,
            "m = (1 + {boost} min(qᵢ, {cap})) ρᵢ τᵢ where only policy i is in A",
            "qᵢ: the number of values that policy i changed with others, over those that it alone changed, in {scope}",
            _CHANGERS,
            _RELATIVE,
        ),
        (_RAM,),
        {
            "changed": _CHANGED,
            "boost": Option(0.1, "RAM+'s r, how much unique values are enlarged", low=0),
            "cap": Option(0.2, "RAM+'s α, the largest overlap that counts", low=0),
            "scope": _SCOPE,
        },
        lambda facts, name, rows, options: facts.boosts(name, rows, **options),
        relative=True,
        keeps=lambda options, weights: True,
    ),
    "sce": Method(
        sce,
        "SCE: select where policies differ, weigh by squares, erase minority signs",
        "SCE",
        (
            "m = Σ_A ρᵢ ηᵢ τ̂ᵢ / Σ_A |ρᵢ| ηᵢ",
            "τ̂ᵢ = τᵢ where the variance over all policies is among the largest {select} of those in its tensor, else 0",
            "ηᵢ = Σ τ̂ᵢ² / Σⱼ Σ τ̂ⱼ², the sums over its tensor",
            _ELECTED,
            _RELATIVE,
        ),
        (("FuseChat: Knowledge Fusion of Chat Models", "2408.07990"),),
        {"select": Option(0.1, "SCE's τ, share of values selected by variance", low=0, high=1, above_low=True)},
        lambda facts, name, rows, options: facts.selection(name, rows, options["select"], spread),
        relative=True,
        everyone=True,
        keeps=lambda options, weights: bool(options["select"] == 1 or len(weights) == 1),
    ),
    "della": Method(
        della,
        "DELLA: drop small values of a row more often, enlarge the rest, elect a sign",
        "DELLA",
        (
            "m = {join}",
            "τ̂ᵢ = mᵢ τᵢ / kᵢ, mᵢ random masks that keep a value with probability kᵢ (seed {seed})",
            "kᵢ = {density} + {window} ((r − 1)/(n − 1) − 1/2), r the rank of |τᵢ| in its row of n values",
            _ELECTED,
        ),
        (("DELLA-Merging: Reducing Interference in Model Merging through Magnitude-Based Sampling", "2406.11617"),),
        {
            "density": Option(0.7, _DENSITY, low=0, high=1, above_low=True),
            "window": Option(0.14, "DELLA's ε, from the smallest to the largest probability in a row", low=0, high=1),
            "seed": _SEED,
            "join": replace(_JOIN, choices=_JOIN_ANY),
        },
        lambda facts, name, rows, options: {
            "kept": facts.ranked_masks(name, rows, options["density"], options["window"], options["seed"])
        },
        keeps=_keeps_elected,
        fits=_window_fits,
    ),
    "breadcrumbs": Method(
        breadcrumbs,
        "Breadcrumbs: drop the smallest values and the outliers of each tensor, then Σ λᵢτᵢ",
        "Breadcrumbs",
        (
            "m = {join}",
            "τ̂ᵢ = τᵢ where |τᵢ| is among the largest {density} of its tensor after the {outliers} largest, else 0",
        ),
        (("Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse Masks", "2312.06795"),),
        {
            "density": Option(0.14, _DENSITY, low=0, high=1, above_low=True),
            "outliers": Option(0.01, "share of the largest values that is dropped", low=0, high=1),
            "join": replace(_JOIN, default="all", choices=_JOIN_ANY),
        },
        lambda facts, name, rows, options: facts.bands(name, rows, options["density"], options["outliers"]),
        keeps=_keeps_elected,
    ),
}


def check_method(method: str, options: Mapping[str, OptionValue], policies: int) -> dict[str, OptionValue]:
    """Return all options of a method for this number of policies, with defaults filled in.

    Raises:
        UserError: an unknown method or option, an option out of range, a wrong number of policies.
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
    filled = {name: options.get(name, option.default) for name, option in row.options.items()}
    if not any(problems) and row.fits and (expected := row.fits(filled)):
        got = " ".join(f"--{name} {value}" for name, value in filled.items())
        problems.append(Problem("out of range", where=f"--method {method}", expected=expected, got=got))
    if found := [problem for problem in problems if problem]:
        raise UserError(found)
    return filled


def _check_option(method: str, row: Method, name: str, value: OptionValue) -> Problem | None:
    if name not in row.options:
        known = ", ".join(f"--{key}" for key in row.options) or "none"
        return Problem(f"not an option of {method}", where=f"--{name}", expected=known, got=str(value))
    expected = row.options[name].check(value)
    return Problem("out of range", where=f"--{name}", expected=expected, got=str(value)) if expected else None

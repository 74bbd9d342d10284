"""The table of merge methods. A row has everything the project knows about a method; a new method is a new row.

Command line, project files, model cards, legends and the documents' tables are made from the rows, or tested against
them. The rules themselves are in `merge_rules.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rewarded_lines.errors import Problem, UserError, did_you_mean, fail
from rewarded_lines.merger.merge_rules import Rule, consensus, dare, dare_ties, slerp_weights, soup, ties

OptionValue = float | int | str


@dataclass(frozen=True)
class Option:
    """A parameter the user may set, as `--name` or in a project's `options:`.

    Attributes:
        default: its type is the option's.
        choices: the values of a text, each with its form in the method's equation.
        above_low: whether `low` itself is refused.
    """

    default: OptionValue
    help: str
    low: float = -math.inf
    high: float = math.inf
    choices: Mapping[str, str] = field(default_factory=dict)
    above_low: bool = False

    def check(self, value: OptionValue) -> str:
        """Return the expectation that `value` does not meet, or ""."""
        if self.choices:
            return "" if value in self.choices else " or ".join(self.choices)
        whole = isinstance(self.default, int)
        bounds = f"a {'whole ' if whole else ''}number {'>' if self.above_low else '≥'} {self.low:g}"
        bounds += f" and ≤ {self.high:g}" if self.high < math.inf else ""
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
            return bounds
        inside = (self.low < value if self.above_low else self.low <= value) and value <= self.high
        return "" if inside else bounds

    def written(self, value: OptionValue) -> str:
        """Return a value's form in the method's equation."""
        return f"{value:g}" if isinstance(value, float) else self.choices.get(str(value), str(value))


@dataclass(frozen=True)
class Method:
    """One row of the table of methods.

    Attributes:
        rule: the pure function on residuals.
        label: its name in legends; "" for the name that users type.
        equation: the merged residual m of the residuals τᵢ, a line for each part; {name} is an option's value.
        papers: title and arXiv number of each.
        options: passed to the rule by name, except `scope` and `seed`, which control measures and masks.
        needs: the measure that the rule takes as a parameter of this name: "thresholds" for each policy or "kept"
            masks; or the "gram" matrix for `weigh`.
        weigh: turns the user's weights into the rule's, tensor by tensor.
        weights: "simplex" (≥ 0, sum 1), "free" (any), "share" (each in 0 … 1), or "none" (the method sets them).
        policies: the required number of policies; 0 for any.
        keeps: given options and weights of which one is not 0, whether the rule returns that residual times its
            weight, value for value. By default only `soup` does.
    """

    rule: Rule
    summary: str
    label: str = ""
    equation: tuple[str, ...] = ("m = Σ λᵢ τᵢ",)
    papers: tuple[tuple[str, str], ...] = ()
    options: Mapping[str, Option] = field(default_factory=dict)
    needs: Literal["", "thresholds", "kept", "gram"] = ""
    weigh: Callable[[Sequence[float], Sequence[Sequence[float]]], tuple[float, ...]] | None = None
    weights: Literal["simplex", "free", "share", "none"] = "simplex"
    policies: int = 0
    keeps: Callable[[Mapping[str, Any], Sequence[float]], bool] | None = None

    def written(self, options: Mapping[str, OptionValue]) -> list[str]:
        """Return the lines of the equation with the values of all options."""
        values = {name: option.written(options[name]) for name, option in self.options.items()}
        return [line.format(**values) for line in self.equation]

    def copies(self, options: Mapping[str, OptionValue], weights: Sequence[float]) -> int | None:
        """Return the policy whose residual, times its weight, is the merged residual value for value, or None.

        Such a tensor can be copied, bit for bit, if the schedule's scale times the weight is 1.
        """
        active = [index for index, weight in enumerate(weights) if weight != 0]
        kept = self.keeps(options, weights) if self.keeps else self.rule is soup
        return active[0] if kept and len(active) == 1 else None


def _keeps_elected(options: Mapping[str, Any], weights: Sequence[float]) -> bool:
    """True if all values are kept, and a mean over one policy does not cancel its weight."""
    return bool(options["density"] == 1) and (options["join"] == "sum" or sum(weights) == 1)


_DENSITY = "share of each residual that is kept"
_DROPPED = Option(0.1, _DENSITY, low=0, high=1, above_low=True)
_SEED = Option(0, "of the random masks", low=0)
_JOIN = Option(
    "mean",
    "how values of the elected sign are joined",
    choices={"mean": "Σ_A λᵢ τ̂ᵢ / Σ_A λᵢ", "sum": "Σ_A λᵢ τ̂ᵢ"},
)
_SCOPE = Option(
    "model",
    "trim by magnitude over the whole model or each tensor",
    choices={"model": "the whole residual", "tensor": "its tensor"},
)
_ELECTED = "A: the policies where τ̂ᵢ has the sign of Σ λᵢ τ̂ᵢ, value by value"
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
_DARE = ("Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch", "2311.03099")

MOD = "mod"
"""Stands for a method in a sweep, but merges nothing: policies are mixed while they decode (arXiv 2406.18853)."""
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
        needs="gram",
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
        "thresholds",
        keeps=_keeps_elected,
    ),
    "dare": Method(
        dare,
        "DARE: drop values at random, enlarge the rest, then Σ λᵢτᵢ",
        "DARE",
        ("m = Σ λᵢ mᵢ τᵢ / {density}", _DRAWN),
        (_DARE,),
        {"density": _DROPPED, "seed": _SEED},
        "kept",
        keeps=lambda options, weights: bool(options["density"] == 1),
    ),
    "dare-ties": Method(
        dare_ties,
        "DARE's dropping, then TIES's election",
        "DARE-TIES",
        ("m = {join}", "τ̂ᵢ = mᵢ τᵢ / {density}", _DRAWN, _ELECTED),
        (_DARE, _TIES),
        {"density": _DROPPED, "seed": _SEED, "join": _JOIN},
        "kept",
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
        # A single policy needs all its values.
        keeps=lambda options, weights: bool(options["agree"] <= (1 if len(weights) == 1 else 0)),
    ),
}


def check_method(method: str, options: Mapping[str, OptionValue], policies: int) -> dict[str, OptionValue]:
    """Return all options of a method for this number of policies, with defaults filled in.

    Raises:
        UserError: an unknown method or option, an option out of range, a wrong number of policies.
    """
    if method == MOD:
        remedy = "sweep it with `--engine hf` and `methods: [mod]`; to merge, name a method such as soup"
        raise fail("mod makes no model: it mixes policies while they decode", where="--method", remedy=remedy)
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

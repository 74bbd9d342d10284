"""The form of a row in the table of merge methods, and of its options."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import signature
from typing import Any, Literal

from rewarded_lines.merger.merge_rules import Rule, relative, soup

OptionValue = float | int | str
Measure = Callable[[Any, str, Sequence[int], Mapping[str, Any]], Mapping[str, Any]]
"""From `Facts`, a tensor's name, the policies that take part, and the options: parameters of the rule, by name."""


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
        options: those that are parameters of the rule are passed to it, the others control measures and masks.
        measure: measures a whole tensor for the rule; its "kept" are masks, drawn block by block, see `Mask`.
        weigh: turns the user's weights into the rule's by the tensor's matrix of scalar products.
        relative: the rule gets ρᵢ = λᵢ/maxⱼ|λⱼ| in place of λᵢ: for methods whose paper has no weights. With equal
            λ every ρ is 1, the paper's method; at a corner the policy's ρ is 1.
        everyone: policies of weight 0 take part, too, so that measures and masks are the same for every λ.
        weights: "simplex" (≥ 0, sum 1), "free" (any), "share" (each in 0 … 1), or "none" (the method sets them).
        policies: the required number of policies; 0 for any.
        fits: returns the expectation that options do not meet together, or "".
        keeps: given options and weights of which one is not 0, whether the rule returns that residual times its
            weight, value for value. By default only `soup` does.
    """

    rule: Rule
    summary: str
    label: str = ""
    equation: tuple[str, ...] = ("m = Σ λᵢ τᵢ",)
    papers: tuple[tuple[str, str], ...] = ()
    options: Mapping[str, Option] = field(default_factory=dict)
    measure: Measure | None = None
    weigh: Callable[[Sequence[float], Sequence[Sequence[float]]], tuple[float, ...]] | None = None
    relative: bool = False
    everyone: bool = False
    weights: Literal["simplex", "free", "share", "none"] = "simplex"
    policies: int = 0
    keeps: Callable[[Mapping[str, Any], Sequence[float]], bool] | None = None
    fits: Callable[[Mapping[str, Any]], str] | None = None

    @property
    def linear(self) -> bool:
        """True if the merged residual is a weighted sum, with the same weights for all tensors."""
        return self.rule is soup and not self.weigh

    def factors(self, weights: Sequence[float]) -> tuple[float, ...]:
        """Return the weights that the rule gets for the user's λ, before `weigh`."""
        return relative(weights) if self.relative else tuple(weights)

    def parameters(self, options: Mapping[str, OptionValue]) -> dict[str, Any]:
        """Return the options that the rule takes as parameters."""
        taken = signature(self.rule).parameters
        return {name: value for name, value in options.items() if name in taken}

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

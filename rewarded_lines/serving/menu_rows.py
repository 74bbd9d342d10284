"""The rows of a menu: a curve each, and what makes two merges of them one model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rewarded_lines.merger.method_row import OptionValue
from rewarded_lines.merger.methods import METHODS
from rewarded_lines.merger.spec import MergeSpec, on_simplex


@dataclass(frozen=True)
class Row:
    """A curve that requests may name.

    Attributes:
        at: the merge at weights λ.
        method: that of the merges, a key of `METHODS`.
        label: for people.
        own: whether the row sets its schedule itself, so that a request cannot change α and β.
        matched: whether the schedule follows from norms, which takes time.
    """

    at: Callable[[tuple[float, ...]], MergeSpec]
    method: str = "soup"
    label: str = ""
    own: bool = False
    matched: bool = False

    def takes(self, weights: Sequence[float]) -> bool:
        """Return whether a name with this row may have such weights."""
        kind = METHODS[self.method].weights
        return kind == "free" or (on_simplex(weights) if kind == "simplex" else min(weights) >= 0 and max(weights) <= 1)


def identity(spec: MergeSpec) -> tuple[Any, ...]:
    """Return what makes a merge: all weighted sums with equal factors are one model."""
    if METHODS[spec.method].sums:
        return spec.factors, spec.schedule
    return spec.method, tuple(sorted(spec.options.items())), spec.weights, spec.schedule


def option_value(spec: MergeSpec, key: str, text: str) -> OptionValue:
    """Return an option's value as its default's type, or the text as it is, which `complete` then refuses."""
    try:
        return type(METHODS[spec.method].options[key].default)(text)
    except ValueError:
        return text

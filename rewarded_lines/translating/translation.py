"""The arguments of `merge` that another tool's config comes to, and the command line that says them."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rewarded_lines.rules.methods import METHODS, OptionValue
from rewarded_lines.rules.preferences import TOLERANCE


@dataclass(frozen=True)
class Translation:
    """The arguments of `merge` that a file comes to.

    Attributes:
        base: folder or Hub id.
        policies: likewise, by name.
        weights: λ, one for each.
        alpha: α.
        beta: β.
        method: a key of `METHODS`.
        options: of the method.
        dtype: of the output.
        full: policies are adapters to fold, since mergekit writes whole models.
        blocks: how many blocks the models must have, None for any number.
        notes: where the definitions part, for people.
    """

    base: str
    policies: Mapping[str, str]
    weights: tuple[float, ...]
    alpha: float = 1.0
    beta: float = 0.0
    method: str = "soup"
    options: Mapping[str, OptionValue] = field(default_factory=dict)
    dtype: str = "auto"
    full: bool = False
    blocks: int | None = None
    notes: tuple[str, ...] = ()

    @property
    def extrapolate(self) -> bool:
        """Whether the weights leave what the method takes without being asked."""
        return METHODS[self.method].weights == "simplex" and not on_simplex(self.weights)

    def command(self, out: str = "merged") -> str:
        """Return the command line that makes the same merge."""
        named = [path if Path(path).name == name else f"{name}={path}" for name, path in self.policies.items()]
        # Of two weights the second is 1 − λ, in decimal.
        one_number = len(self.weights) == 2 and self.weights[1] == round(1 - self.weights[0], 12)
        lam = ",".join(map(_text, self.weights[:1] if one_number else self.weights))
        pairs = [("base", self.base), *(("policy", policy) for policy in named)]
        # A single policy's weight is 1 unless it says otherwise.
        pairs += [("lam", lam)] if self.weights != (1.0,) else []
        pairs += [("alpha", _text(self.alpha))] if self.alpha != 1 else []
        pairs += [("beta", _text(self.beta))] if self.beta != 1 else []
        pairs += [("method", self.method)] if self.method != "soup" else []
        pairs += [(name, str(value)) for name, value in self.options.items()]
        pairs += [("dtype", self.dtype)] if self.dtype != "auto" else []
        pairs += [("as", "full")] if self.full else []
        words = [word for name, value in pairs for word in (f"--{name}", value)]
        words += ["--extrapolate"] if self.extrapolate else []
        return shlex.join(["rewarded-lines", "merge", *words, "--out", out])


def on_simplex(weights: Sequence[float]) -> bool:
    """Say whether weights are ≥ 0 and sum to 1."""
    return min(weights) >= 0 and abs(math.fsum(weights) - 1) <= TOLERANCE


def _text(value: float) -> str:
    return repr(int(value)) if value == int(value) else repr(value)

"""`MergeSpec`, the numbers of one merge: how residuals are joined, and the command that does it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rewarded_lines.merger.lines_schedule import Outside
from rewarded_lines.merger.methods import METHODS, OptionValue, check_method
from rewarded_lines.merger.preferences import on_simplex


@dataclass(frozen=True)
class MergeSpec:
    """The numbers of one merge; records, points of a sweep, cards and commands are made from it.

    Attributes:
        weights: λ_i, one for each policy. With fewer weights than policies, the trailing policies are ignored.
        alpha: α of the LiNeS schedule, the scale of the first block.
        beta: β, what the last block gets on top.
        method: a key of `METHODS`.
        options: of the method.
        outside: what tensors outside the blocks get, see `tensor_scale`.
    """

    weights: tuple[float, ...]
    alpha: float = 1.0
    beta: float = 1.0
    method: str = "soup"
    options: Mapping[str, OptionValue] = field(default_factory=dict, hash=False)
    outside: Outside = "alpha"

    @property
    def scaled(self) -> bool:
        """Whether LiNeS scales the residual, so that the merge is more than its method."""
        return (self.alpha, self.beta) != (1, 0)

    @property
    def extrapolates(self) -> bool:
        """Whether the weights leave the simplex although the method asks for weights on it."""
        return METHODS[self.method].weights == "simplex" and not on_simplex(self.weights)

    def complete(self, policies: int) -> MergeSpec:
        """Return the spec with its method's options checked and filled in.

        Raises:
            UserError: the method, an option or the number of policies is wrong.
        """
        return replace(self, options=check_method(self.method, self.options, policies))

    def as_dict(self, policies: Sequence[str]) -> dict[str, Any]:
        """Return the spec as JSON can hold it, the weights by the names of their policies."""
        return {
            "method": self.method,
            "options": dict(self.options),
            "weights": dict(zip(policies, self.weights, strict=True)),
            "alpha": self.alpha,
            "beta": self.beta,
            "outside": self.outside,
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> MergeSpec:
        """Return the spec that `as_dict` described."""
        weights = tuple(map(float, content["weights"].values()))
        options, outside = dict(content.get("options", {})), content.get("outside", "alpha")
        return cls(weights, float(content["alpha"]), float(content["beta"]), str(content["method"]), options, outside)

    def command(self, base: str, policies: Mapping[str, str], out: str = "merged", **how: Any) -> str:
        """Return the `rewarded-lines merge` command that makes this merge; it names only what differs from the default.

        Args:
            base: folder or Hub id.
            policies: likewise, by name, in the order of the weights.
            out: the output folder.
            how: other arguments of `merge` with their values: dtype, as_, layers, max_shard_size.
        """
        pairs = [("base", base), *(("policy", _named(*policy)) for policy in policies.items())]
        # `merge` completes the second of two weights as 1 − λ; a single policy has weight 1 by default.
        one_number = len(self.weights) == 2 and self.weights[1] == round(1 - self.weights[0], 12)
        if METHODS[self.method].weights != "none" and self.weights != (1.0,):
            pairs.append(("lam", ",".join(map(_text, self.weights[:1] if one_number else self.weights))))
        given = {"alpha": _text(self.alpha), "beta": _text(self.beta), "method": self.method, **self.options}
        given |= {"outside": self.outside, **{name.strip("_"): value for name, value in how.items()}}
        pairs += [(name, str(value)) for name, value in given.items() if value != _DEFAULTS.get(name)]
        words = [word for name, value in pairs for word in (f"--{name.replace('_', '-')}", value)]
        extrapolate = ["--extrapolate"] if self.extrapolates else []
        return shlex.join(["rewarded-lines", "merge", *words, *extrapolate, "--out", out])


# The defaults of `merge`, which a command need not name.
_DEFAULTS = {"alpha": "1", "beta": "1", "method": "soup", "outside": "alpha", "dtype": "auto", "as": "auto"}
_DEFAULTS |= {"max_shard_size": "5GB"}


def _named(name: str, place: str) -> str:
    """Return a policy as `--policy` takes it, which splits at the first `=`; a folder of that name needs no other."""
    bare = Path(place).name == name and "=" not in place
    return place if bare else f"{name.replace('=', '-')}={place}"


def _text(value: float) -> str:
    return repr(int(value)) if value == int(value) else repr(value)

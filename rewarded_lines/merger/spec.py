"""What one merge is: the weights λ, and `MergeSpec` with all its numbers.

The command line imports this file at its start, so nothing here may load a heavy library.
"""

from __future__ import annotations

import math
import shlex
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

from rewarded_lines.errors import Problem, UserError
from rewarded_lines.merger.lines_schedule import Line, Outside, Schedule, brief_number, canonical
from rewarded_lines.merger.method_row import OptionValue
from rewarded_lines.merger.methods import METHODS, check_method
from rewarded_lines.merger.schedule_forms import recorded_schedule
from rewarded_lines.options import split_named

TOLERANCE = 1e-6
# File systems take names of 255 bytes; an unfinished output has more than its own.
_LONGEST = 200
# The defaults of `merge`, which a command need not repeat.
_DEFAULTS = {"method": "soup", "outside": "alpha", "dtype": "auto", "as": "auto"}
_DEFAULTS |= {"max_shard_size": "5GB", "tokenizer": "auto", "config_from": "auto"}


def parse_weights(
    lam: float | str | Sequence[float],
    policies: Sequence[str],
    extrapolate: bool = False,
    total: bool = True,
    *,
    option: str = "--lam",
) -> tuple[float, ...]:
    """Return one weight per policy.

    Args:
        lam: the weights, also as text: `0.2,0.3,0.5`, or by name: `a=0.2,c=0.8`, and 0 for the others. A single
            number is the weight of the first of two policies, and the second gets 1 − λ.
        policies: their names, in order; rewards, if the option is `--preference`.
        extrapolate: allow weights outside 0 … 1 and sums other than 1.
        total: whether the sum must be 1.
        option: the name of the option, for messages.

    Raises:
        UserError: not numbers, a wrong number of them, negative ones, or a sum other than 1.
    """
    single = isinstance(lam, float | int | str)
    text = str(lam) if isinstance(lam, float | int | str) else ",".join(map(str, lam))

    def problem(what: str, expected: str, remedy: str = "") -> Problem:
        return Problem(what, f"{option} {text}", expected, text, remedy)

    try:
        weights = tuple(map(float, _by_name(text, policies) if "=" in text else text.split(",")))
    except ValueError:
        weights = (math.nan,)
    if not all(map(math.isfinite, weights)):
        names = f"; by name: {','.join(f'{name}=…' for name in policies)}" if "=" in text else ""
        raise UserError(problem("not a weight", f"a number such as 0.5, or 0.2,0.3,0.5{names}"))
    if single and len(weights) == 1 and len(policies) == 2:
        # Round: 1 − 0.9 is 0.09999999999999998 in binary.
        weights = (weights[0], round(1 - weights[0], 12))
    problems = []
    if len(weights) != len(policies):
        expected = f"{len(policies)} weights, for {', '.join(policies)}"
        kind = "policies" if option == "--lam" else "rewards"
        remedy = "leave it out for equal weights" if option == "--lam" else ""
        problems.append(problem(f"{len(weights)} weights for {len(policies)} {kind}", expected, remedy))
    elif not extrapolate:
        remedy = "pass --extrapolate if you mean to leave the simplex"
        if any(not 0 <= weight <= 1 for weight in weights):
            problems.append(problem("a weight lies outside 0 to 1", "0 ≤ λ ≤ 1", remedy))
        if total and abs(sum(weights) - 1) > TOLERANCE:
            problems.append(problem("the weights do not sum to 1", "a sum of 1", remedy))
    if problems:
        raise UserError(problems)
    return weights


def _by_name(text: str, names: Sequence[str]) -> list[str]:
    """Return the weights of `a=0.2,c=0.8` in the order of the names; a ValueError for other or repeated names."""
    pairs = [(name.strip(), weight) for name, _, weight in (part.rpartition("=") for part in split_named(text, names))]
    found = dict(pairs)
    if len(found) < len(pairs) or not found.keys() <= set(names):
        raise ValueError(text)
    return [found.get(name, "0") for name in names]


def on_simplex(weights: Sequence[float]) -> bool:
    """True if weights are ≥ 0 and sum to 1."""
    return min(weights) >= 0 and abs(math.fsum(weights) - 1) <= TOLERANCE


def simplex_grid(policies: int, points: int) -> list[tuple[float, ...]]:
    """Return every weight vector whose entries are multiples of 1/(points − 1), in lexical order.

    For two policies these are `points` equally spaced λ from 0 to 1, as (λ, 1 − λ); the corners are exact.

    Args:
        policies: N ≥ 1, the length of each vector.
        points: ≥ 2, the number of points on each edge of the simplex.
    """
    steps = points - 1
    end = steps + policies - 1
    # N − 1 bars divide a row of steps into N parts.
    rows = [(-1, *bars, end) for bars in combinations(range(end), policies - 1)]
    return [tuple((right - left - 1) / steps for left, right in pairwise(row)) for row in rows]


def folder_name(weights: Sequence[float]) -> str:
    """Return the folder of one output among several: `lam=0.25` for two policies, else `lam=0.20,0.30,0.50`.

    Of many policies this may be longer than file systems take: then `lam=equal`, or a hash of the weights.
    """
    one_number = len(weights) == 2 and abs(sum(weights) - 1) <= TOLERANCE
    shown = weights[:1] if one_number else weights
    name = ",".join(f"{weight:.2f}" if round(weight, 2) == weight else repr(weight) for weight in shown)
    if len(name) > _LONGEST:
        equal = len(set(weights)) == 1 and on_simplex(weights)
        name = "equal" if equal else f"{zlib.crc32(name.encode()):08x}"
    return f"lam={name}"


@dataclass(frozen=True)
class MergeSpec:
    """The numbers of one merge; records, points of a sweep, cards and commands are made from it.

    Attributes:
        weights: λ_i. With fewer weights than policies, the trailing policies are ignored.
        alpha: α of the LiNeS schedule, the scale of the first block.
        beta: β, added by the last block.
        method: a key of `METHODS`.
        options: of the method.
        outside: the scale of tensors outside the blocks, see `Schedule`.
        lines: in place of α and β, which are then 1: a line for each policy, or one with coefficients for all.
        modules: factors by kind of module.
    """

    weights: tuple[float, ...]
    alpha: float = 1.0
    beta: float = 1.0
    method: str = "soup"
    options: Mapping[str, OptionValue] = field(default_factory=dict, hash=False)
    outside: Outside = "alpha"
    lines: tuple[Line, ...] = ()
    modules: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        """Write a merge in one way: equal merges are equal, and share the records of a sweep."""
        self.__dict__.update(canonical(self.alpha, self.beta, self.lines, self.modules))

    @property
    def schedule(self) -> Schedule:
        """The scale of every tensor."""
        return Schedule(self.lines or (Line(self.alpha, self.beta),), self.modules, self.outside)

    @property
    def factors(self) -> tuple[float, ...]:
        """Return the weights as the method takes them: λ, or ρᵢ = λᵢ/maxⱼ|λⱼ|."""
        return METHODS[self.method].factors(self.weights)

    @property
    def scaled(self) -> bool:
        """True if a schedule scales the residual."""
        return (self.alpha, self.beta) != (1, 0) or bool(self.modules)

    @property
    def extrapolates(self) -> bool:
        """True if the weights leave the simplex, though the method expects them on it."""
        return METHODS[self.method].weights == "simplex" and not on_simplex(self.weights)

    def complete(self, policies: int) -> MergeSpec:
        """Return the spec with its method's options checked and the defaults filled in.

        Raises:
            UserError: the method, an option or the number of policies is wrong.
        """
        return replace(self, options=check_method(self.method, self.options, policies))

    def as_dict(self, policies: Sequence[str]) -> dict[str, Any]:
        """Return the spec for JSON, the weights by the names of their policies."""
        weights = dict(zip(policies, self.weights, strict=True))
        return {
            "method": self.method,
            "options": dict(self.options),
            "weights": weights,
            **self.schedule.as_dict(policies),
            "outside": self.outside,
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> MergeSpec:
        """Return the spec that `as_dict` described."""
        weights = tuple(map(float, content["weights"].values()))
        options, outside = dict(content.get("options", {})), content.get("outside", "alpha")
        schedule = recorded_schedule(content, list(content["weights"]))
        return cls(weights, method=str(content["method"]), options=options, outside=outside, **schedule)

    def command(self, base: str, policies: Mapping[str, str], out: str = "merged", **how: Any) -> str:
        """Return the `rewarded-lines merge` command that makes this merge, without arguments equal to the default.

        Args:
            base: folder or Hub id.
            policies: likewise, by name, in the order of the weights.
            out: the output folder.
            how: other arguments of `merge`: dtype, as_, rank, layers, tower, max_shard_size, tokenizer, config_from.
        """
        pairs = [("base", base), *(("policy", _named(*policy)) for policy in policies.items())]
        # `merge` completes the second of two weights as 1 − λ; a single policy has weight 1 by default.
        one_number = len(self.weights) == 2 and self.weights[1] == round(1 - self.weights[0], 12)
        if METHODS[self.method].weights != "none" and self.weights != (1.0,):
            pairs.append(("lam", ",".join(map(brief_number, self.weights[:1] if one_number else self.weights))))
        pairs += self.schedule.arguments([name.replace("=", "-") for name in policies])
        given = {"method": self.method, **self.options, "outside": self.outside}
        given |= {name.strip("_"): value for name, value in how.items()}
        pairs += [(name, str(value)) for name, value in given.items() if value != _DEFAULTS.get(name)]
        words = [word for name, value in pairs for word in (f"--{name.replace('_', '-')}", value)]
        extrapolate = ["--extrapolate"] if self.extrapolates else []
        return shlex.join(["rewarded-lines", "merge", *words, *extrapolate, "--out", out])


def _named(name: str, place: str) -> str:
    """Return a policy for `--policy`, which splits at the first `=`; the name is left out if the folder has it."""
    bare = Path(place).name == name and "=" not in place
    return place if bare else f"{name.replace('=', '-')}={place}"

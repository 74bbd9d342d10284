"""What one merge is: the weights λ, `MergeSpec` with all its numbers, and `MergeOptions`, which add how to write it.

The command line imports this file at its start, so nothing here may load a heavy library.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any, Literal

from rewarded_lines.checkpoints.module_kinds import KINDS
from rewarded_lines.errors import Problem, UserError
from rewarded_lines.merger.lines_schedule import Line, Outside, Schedule, brief_number, canonical
from rewarded_lines.merger.methods import METHODS, OptionValue, check_method
from rewarded_lines.merger.schedule_forms import Coefficients, Factors, Values, recorded_schedule
from rewarded_lines.options import option
from rewarded_lines.progress import SILENT, Progress

Score = str | Callable[[Path], float]
TOWER_HELP = "vision=base keeps a tower as the base has it, =flat gives it α, =depth a depth of its own; repeat."
METHODS_PANEL = "Options of the methods"
TOLERANCE = 1e-6
# The defaults of `merge`, which a command need not repeat.
_DEFAULTS = {"method": "soup", "outside": "alpha", "dtype": "auto", "as": "auto"}
_DEFAULTS |= {"max_shard_size": "5GB", "tokenizer": "auto", "config_from": "auto"}


def parse_weights(
    lam: float | str | Sequence[float], policies: Sequence[str], extrapolate: bool = False, total: bool = True
) -> tuple[float, ...]:
    """Return one weight per policy.

    Args:
        lam: the weights, also as text: `0.2,0.3,0.5`. A single number is the weight of the first of two policies,
            and the second gets 1 − λ.
        policies: their names, in order.
        extrapolate: allow weights outside 0 … 1 and sums other than 1.
        total: whether the sum must be 1.

    Raises:
        UserError: not numbers, a wrong number of them, negative ones, or a sum other than 1.
    """
    single = isinstance(lam, float | int | str)
    text = str(lam) if isinstance(lam, float | int | str) else ",".join(map(str, lam))

    def problem(what: str, expected: str, remedy: str = "") -> Problem:
        return Problem(what, f"--lam {text}", expected, text, remedy)

    try:
        weights = tuple(float(part) for part in text.split(","))
    except ValueError:
        weights = (math.nan,)
    if not all(map(math.isfinite, weights)):
        raise UserError(problem("not a weight", "a number such as 0.5, or 0.2,0.3,0.5"))
    if single and len(weights) == 1 and len(policies) == 2:
        # Round: 1 − 0.9 is 0.09999999999999998 in binary.
        weights = (weights[0], round(1 - weights[0], 12))
    problems = []
    if len(weights) != len(policies):
        expected = f"{len(policies)} weights, for {', '.join(policies)}"
        problems.append(problem(f"{len(weights)} weights for {len(policies)} policies", expected))
    elif not extrapolate:
        remedy = "pass --extrapolate if you mean to leave the simplex"
        if any(not 0 <= weight <= 1 for weight in weights):
            problems.append(problem("a weight lies outside 0 to 1", "0 ≤ λ ≤ 1", remedy))
        if total and abs(sum(weights) - 1) > TOLERANCE:
            problems.append(problem("the weights do not sum to 1", "a sum of 1", remedy))
    if problems:
        raise UserError(problems)
    return weights


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
    """Return the folder of one output among several: `lam=0.25` for two policies, else `lam=0.20,0.30,0.50`."""
    one_number = len(weights) == 2 and abs(sum(weights) - 1) <= TOLERANCE
    shown = weights[:1] if one_number else weights
    return "lam=" + ",".join(f"{weight:.2f}" if round(weight, 2) == weight else repr(weight) for weight in shown)


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
            how: other arguments of `merge`: dtype, as_, layers, tower, max_shard_size, tokenizer, config_from.
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


def joined_towers(towers: str | Sequence[str] | None) -> str | None:
    """Return several texts such as `vision=flat` as one, separated by commas; None without any."""
    return towers if isinstance(towers, str) else ",".join(towers or ()) or None


def _named(name: str, place: str) -> str:
    """Return a policy for `--policy`, which splits at the first `=`; the name is left out if the folder has it."""
    bare = Path(place).name == name and "=" not in place
    return place if bare else f"{name.replace('=', '-')}={place}"


def _methods_that_begin(incomplete: str) -> list[tuple[str, str]]:
    return [(name, row.summary) for name, row in METHODS.items() if name.startswith(incomplete)]


@dataclass(frozen=True)
class MergeOptions:
    """How policies are merged and written, for Python and for the command line; the help texts describe the fields.

    Attributes:
        alpha: a number, or numbers by policy; None is 1. "auto" chooses (‖Σ τ_i‖₁/‖m‖₁)/N, as LiNeS' authors do.
        beta: likewise.
        schedule: a coefficient for each block in place of α and β; see `read_schedule`.
        modules: factors by kind of module, e.g. {"mlp": 0.8}.
        options: of the method, e.g. {"density": 0.2}.
        score: or a function from a model's folder to a number; higher is better.
        dtype: "auto" gives each tensor the widest type that it has in the inputs.
        additions: adds to the model cards, see `Additions` in model_card.py.
        progress: receives the steps and the bytes written.
    """

    alpha: Values | Literal["auto"] = option(
        None,
        "LiNeS α: scale of the first block, 1 if not given; auto for the authors' choice; POLICY=α for one policy.",
        typed=list[str] | None,
    )
    beta: Values = option(
        None,
        "LiNeS β: added by the last block, 1 if not given; 0 is Rewarded Soups; POLICY=β for one policy.",
        typed=list[str] | None,
    )
    schedule: Coefficients = option(
        None,
        "In place of α and β, a scale for each block: 1,1,1.2 or a file; POLICY=1,1,1.2 for one policy, repeat.",
        typed=list[str] | None,
    )
    modules: Factors = option(None, f"Factors by kind of module, mlp=0.8: {', '.join(KINDS)}.", typed=list[str] | None)
    outside: Outside = option(
        "alpha",
        "What embeddings, norm and head get: alpha, or depth (as the block beside them).",
        typed=str,
        offers=("alpha", "depth"),
    )
    method: str = option(
        "soup",
        f"How residuals are joined: {', '.join(METHODS)}; see below.",
        offers=_methods_that_begin,
    )
    options: Mapping[str, OptionValue] = field(default_factory=dict)
    score: Score | None = option(
        None,
        "greedy: a command that prints a number for {model}, or file.py:function.",
        typed=str | None,
        rich_help_panel=METHODS_PANEL,
    )
    as_: str = option(
        "auto",
        "full models, LoRA adapter, or auto: an adapter if all policies are adapters.",
        offers=("auto", "full", "adapter"),
    )
    out: str | Path | None = option(None, "Output folder; default merged/lam=…", typed=Path | None)
    dtype: str = option(
        "auto", "auto, float32, bfloat16 or float16.", offers=("auto", "float32", "bfloat16", "float16")
    )
    device: str = option("cpu", "cpu, cuda or cuda:1; auto: a GPU where it is faster.", offers=("cpu", "cuda", "auto"))
    max_shard_size: str = option("5GB", "Largest weight file.")
    overwrite: bool = option(False, "Replace an existing output.")
    dry_run: bool = option(False, "Check everything, write nothing.")
    extrapolate: bool = option(False, "Allow λ outside the simplex.")
    allow_nonfinite: bool = option(False, "Let NaN and infinite values pass.")
    layers: str | None = option(None, r"Pattern of the block list, e.g. 'blocks\.(\d+)\.'")
    tower: str | None = option(None, TOWER_HELP, typed=list[str] | None)
    tokenizer: str = option(
        "auto",
        "Whose tokenizer and chat template the output gets: base, a policy's name, a folder; auto: the policies'.",
    )
    config_from: str = option(
        "auto", "Whose generation_config.json and end tokens: base, a policy's name; auto: the policies'."
    )
    # Importing the type `Additions` would load numpy.
    additions: Callable[[Any], Any] | None = None
    progress: Progress = SILENT

    def __post_init__(self) -> None:
        """Join the towers if they are several."""
        object.__setattr__(self, "tower", joined_towers(self.tower))

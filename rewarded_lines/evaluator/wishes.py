"""What `choose` is asked for: constraints and one aim, checked against the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from rewarded_lines.config import SFT
from rewarded_lines.errors import Problem, UserError, did_you_mean, fail
from rewarded_lines.evaluator.records import Run, mixtures_of
from rewarded_lines.merger.methods import MOD
from rewarded_lines.merger.preferences import each_weights


@dataclass(frozen=True)
class Wish:
    """The constraints and the aim that `choose` was called with."""

    at_least: Mapping[str, float]
    maximize: str | None
    weights: Mapping[str, float] | None
    knee: bool
    methods: Sequence[str]
    interpolate: bool
    preference: Any = None


def checked_wish(run: Run, wish: Wish) -> Wish:
    """Return the wish with its default filled in, a preference by reward; a UserError if it does not fit the run."""
    if wish.preference is not None:
        wish = replace(wish, preference=_preference(run, wish.preference))
    _check_names(run, wish)
    _check_numbers(run, wish)
    decoding = [name for name, points in run.methods().items() if points[0].spec.merge.method == MOD]
    wish = replace(wish, methods=wish.methods or [name for name in run.methods() if name not in decoding])
    if wrong := [name for name in decoding if name in wish.methods or not wish.methods]:
        what = "its points are no models: policies are mixed while they decode"
        remedy = "choose another --method; or add one that merges, such as lines, to `methods:`, and sweep"
        raise fail(what, where=f"--method {wrong[0]}", expected="a method that merges", remedy=remedy)
    aims = sum([wish.maximize is not None, bool(wish.weights), wish.knee, wish.preference is not None])
    left = [name for name in run.objectives if name not in wish.at_least]
    if not aims and wish.at_least and len(left) == 1:
        return replace(wish, maximize=left[0])
    if aims != 1:
        rewards = ", ".join(run.objectives)
        raise fail(
            "say what to look for",
            where=str(run.folder),
            expected="exactly one of --maximize NAME, --weights NAME=W,NAME=W, --preference NAME=μ,NAME=μ and --knee "
            f"(rewards: {rewards})",
            got="more than one" if aims else "none",
        )
    return wish


def _preference(run: Run, given: Any) -> dict[str, float]:
    """Return μ by reward; refuse a run whose policies were not trained for declared mixtures."""
    mixtures = mixtures_of(run)
    if mixtures is None:
        remedy = "declare `mixtures:` in the project and sweep, or use --weights"
        raise fail("the run has no mixtures, which a preference needs", where=str(run.folder), remedy=remedy)
    try:
        (found,) = each_weights(given, mixtures.rewards, False, True, option="--preference")
    except UserError as error:
        # `choose` has no --extrapolate.
        raise UserError(replace(problem, remedy="") for problem in error.problems) from error
    return dict(zip(mixtures.rewards, found, strict=True))


def _check_names(run: Run, wish: Wish) -> None:
    """Refuse unknown rewards and methods, all together."""
    problems = []
    asked = dict.fromkeys([*wish.at_least, *(wish.weights or {})])
    if wish.maximize is not None:
        asked[wish.maximize] = None
    for name in (name for name in asked if name not in run.objectives):
        what, remedy = f"no reward `{name}`", did_you_mean(name, run.objectives)
        if name in run.rewards:
            what, remedy = f"`{name}` is an audit, which `choose` ignores", "its score is in the answer"
        expected = "one of " + ", ".join(run.objectives)
        problems.append(Problem(what, where=str(run.folder), expected=expected, remedy=remedy))
    methods = list(run.methods())
    for name in (name for name in wish.methods if name not in methods):
        what = "SFT is no candidate" if name == SFT else f"no method `{name}`"
        remedy = did_you_mean(name, methods)
        problems.append(Problem(what, where=str(run.folder), expected=", ".join(methods), remedy=remedy))
    if problems:
        raise UserError(problems)


def _check_numbers(run: Run, wish: Wish) -> None:
    """Refuse unusable minima and weights, and --interpolate where it cannot work."""
    if wrong := [f"{name}={bound:g}" for name, bound in wish.at_least.items() if not np.isfinite(bound)]:
        raise fail("not a minimum", where="--at-least", expected="finite numbers", got=", ".join(wrong))
    weights = wish.weights or {}
    fair = all(np.isfinite(weight) and weight >= 0 for weight in weights.values())
    if weights and not (fair and any(weights.values())):
        got = ", ".join(f"{name}={weight:g}" for name, weight in weights.items())
        raise fail("not weights", where="--weights", expected="numbers ≥ 0, one of them above 0", got=got)
    if wish.interpolate and (wish.knee or wish.preference is not None):
        what = "a knee is an evaluated point" if wish.knee else "a preference names one λ"
        raise fail(what, where="--interpolate", remedy="leave it out, or use --maximize")
    policies = list(run.header["policies"])
    if wish.interpolate and len(policies) != 2:
        got = f"{len(policies)} ({', '.join(policies)})"
        raise fail("λ lies between two policies", where="--interpolate", expected="2 policies", got=got)

"""The verb `choose`: the evaluated policy that meets constraints best, and the command that makes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from rewarded_lines.config import SFT
from rewarded_lines.errors import Problem, UserError, did_you_mean, fail
from rewarded_lines.evaluator.paired_scores import tabulate
from rewarded_lines.evaluator.points import PointSpec
from rewarded_lines.evaluator.records import Run, load_run
from rewarded_lines.pareto.bootstrap import LEVEL, Estimate, estimate_samples
from rewarded_lines.pareto.choice import best_under, best_weighted, knee
from rewarded_lines.pareto.interpolation import best_interpolated, interpolate
from rewarded_lines.references import located

NOTE = (
    "The choice was made by these same scores, so they lie a little high: the best of many is also the luckiest. "
    "Scores on fresh prompts (`rewarded-lines score`) do not."
)


@dataclass(frozen=True)
class Chosen:
    """The policy to ship.

    Attributes:
        point: method, weights and schedule.
        interpolated: whether it lies between evaluated λ, so that its scores are a guess.
        scores: expected mean of every reward, audits too, with its interval over prompts.
        meets: by reward with a minimum, the share of resamples of the prompts in which it is met.
        rule: what was asked for, in words.
        command: that makes the policy.
    """

    point: PointSpec
    interpolated: bool
    scores: dict[str, Estimate]
    meets: dict[str, float]
    rule: str
    command: str

    def as_dict(self) -> dict[str, object]:
        """Return the choice as JSON can hold it."""
        scores = {name: vars(score) for name, score in self.scores.items()}
        told = {"interpolated": self.interpolated, "scores": scores, "meets": self.meets, "rule": self.rule}
        return {**self.point.as_dict(), **told, "command": self.command, "note": NOTE}


@dataclass(frozen=True)
class _Wish:
    """The arguments of `choose` that say what is asked for."""

    at_least: Mapping[str, float]
    maximize: str | None
    weights: Mapping[str, float] | None
    knee: bool
    methods: Sequence[str]
    interpolate: bool


def choose(
    run: Path | str,
    *,
    at_least: Mapping[str, float] | None = None,
    maximize: str | None = None,
    weights: Mapping[str, float] | None = None,
    knee: bool = False,
    methods: Sequence[str] = (),
    interpolate: bool = False,
    level: float = LEVEL,
) -> Chosen:
    """Return the policy of a run that meets constraints best; pass one of `maximize`, `weights` and `knee`.

    Audits do not count, and the SFT model is not a candidate. With two rewards and a minimum for one, the other is
    maximized by default.

    Args:
        run: the run folder that `sweep` wrote.
        at_least: the least mean score by reward, in its unit.
        maximize: the reward to be as high as can be.
        weights: by reward; maximizes the weighted sum of standardized scores.
        knee: take the point of the front that gives up least of everything.
        methods: that may be chosen; all by default.
        interpolate: consider λ between evaluated ones, too, where scores are taken to be linear (two policies).
        level: of the intervals.

    Raises:
        UserError: the folder is not a run, a reward or method is unknown, nothing or several things are asked for, or
            no point meets every minimum; the message then names the nearest.
    """
    read = load_run(run)
    wish = _checked(read, _Wish(dict(at_least or {}), maximize, weights, knee, methods, interpolate))
    return _Chooser(read, wish, level).choose()


class _Chooser:
    """The points of one run, and what is asked of them."""

    def __init__(self, run: Run, wish: _Wish, level: float) -> None:
        self._run, self._wish, self._level = run, wish, level
        self._table = tabulate([run])
        # [1 + resamples, points, rewards]; row 0 is the data themselves.
        self._all = self._table.means[..., : len(self._table.rewards)]
        # [points, objectives]
        self._means = self._all[0][:, self._table.objectives]
        self._names = [self._table.rewards[index] for index in self._table.objectives]
        sft = np.stack([run.sft.scores[name] for name in self._names], axis=1)
        spread = sft.std(axis=0)
        self._centre, self._scale = sft.mean(axis=0), np.where(spread > 0, spread, 1.0)
        self._minima = {self._names.index(name): bound for name, bound in wish.at_least.items()}
        # The weight of each reward; 1 for one that is to be maximized.
        given = wish.weights or {wish.maximize or "": 1.0}
        self._slopes = [float(given.get(name, 0.0)) for name in self._names]

    def choose(self) -> Chosen:
        methods = self._table.methods()
        groups = {name: rows for name, rows in methods.items() if name in (self._wish.methods or methods)}
        rows = [row for group in groups.values() for row in group]
        qualified = [row for row in rows if all(self._means[row, at] >= bound for at, bound in self._minima.items())]
        best = qualified[self._best(self._means[qualified])] if qualified else None
        between = self._between(groups, best) if self._wish.interpolate else None
        if between is not None:
            return between
        if best is None:
            raise self._nothing(rows)
        return self._chosen(self._spec(best), self._all[:, best], False)

    def _best(self, means: np.ndarray) -> int:
        if self._wish.knee:
            return knee(means).index
        if self._wish.weights:
            return best_weighted(means, self._slopes, centre=self._centre, scale=self._scale).index
        assert self._wish.maximize is not None
        return best_under(means, self._minima, self._names.index(self._wish.maximize), scale=self._scale).index

    def _between(self, groups: Mapping[str, list[int]], best: int | None) -> Chosen | None:
        """Return the optimum of a method's piecewise linear curve, if it is better than the best evaluated point."""
        found: list[tuple[float, str, float]] = []
        for name, rows in groups.items():
            specs = [self._spec(row) for row in rows]
            if len(rows) < 2 or not self._steady(specs):
                continue
            lams = [spec.weights[0] for spec in specs]
            optimum = best_interpolated(
                lams, self._means[rows], self._slopes, self._minima, centre=self._centre, scale=self._scale
            )
            if optimum.qualifies:
                found.append((optimum.value, name, optimum.lam))
        if not found:
            return None
        value, name, lam = max(found, key=lambda one: one[0])
        rows = groups[name]
        if best is not None and self._value(best) >= value - 1e-12:
            return None
        lams = [self._spec(row).weights[0] for row in rows]
        if lam in lams:
            # The evaluated point misses a minimum by rounding only.
            evaluated = rows[lams.index(lam)]
            return self._chosen(self._spec(evaluated), self._all[:, evaluated], False)
        first = self._spec(rows[0])
        spec = replace(first, merge=replace(first.merge, weights=(lam, 1.0 - lam)))
        return self._chosen(spec, interpolate(lams, self._all[:, rows], lam), True)

    def _steady(self, specs: Sequence[PointSpec]) -> bool:
        """Say whether a method has one schedule for every λ of two policies, so that it has points in between."""
        first = specs[0].merge
        alike = all(replace(spec.merge, weights=first.weights) == first for spec in specs)
        return alike and all(len(spec.weights) == 2 and not spec.checkpoint for spec in specs)

    def _value(self, row: int) -> float:
        return float((np.array(self._slopes) * (self._means[row] - self._centre) / self._scale).sum())

    def _spec(self, row: int) -> PointSpec:
        return self._table.rows[row][0].spec

    def _chosen(self, spec: PointSpec, samples: np.ndarray, interpolated: bool) -> Chosen:
        rewards = self._table.rewards
        scores = {name: estimate_samples(samples[:, index], self._level) for index, name in enumerate(rewards)}
        meets = {
            name: float((samples[1:, rewards.index(name)] >= bound).mean())
            for name, bound in self._wish.at_least.items()
        }
        return Chosen(spec, interpolated, scores, meets, self._rule(), command_for(self._run, spec))

    def _rule(self) -> str:
        wish = self._wish
        bounds = [f"{name} ≥ {bound:g}" for name, bound in wish.at_least.items()]
        if wish.knee:
            aim = "the knee of the front"
        elif wish.weights:
            aim = "most of " + " + ".join(f"{weight:g}·{name}" for name, weight in wish.weights.items())
            aim += " (standardized)"
        else:
            aim = f"most {wish.maximize}"
        return aim + (" with " + ", ".join(bounds) if bounds else "")

    def _nothing(self, rows: list[int]) -> UserError:
        """Say that no point qualifies, and which comes nearest."""
        choice = best_under(self._means[rows], self._minima, 0, scale=self._scale)
        nearest = rows[choice.index]
        reached = ", ".join(f"{self._names[at]} = {self._means[nearest, at]:.4g}" for at in choice.shortfalls)
        between = "" if self._wish.interpolate else "look between the points with --interpolate, "
        return fail(
            "no evaluated policy meets every minimum",
            where=str(self._run.folder),
            expected=", ".join(f"{name} ≥ {bound:g}" for name, bound in self._wish.at_least.items()),
            got=f"the nearest is {self._spec(nearest)}, with {reached}",
            remedy=f"lower a minimum, {between}or add points with `search`",
        )


def command_for(run: Run, spec: PointSpec) -> str:
    """Return the command that makes a point's policy; for a model that is there already, where it lies."""
    if spec.checkpoint:
        known = {**run.header["policies"], **run.header["baselines"]}
        return f"# nothing to merge: {located(known[spec.checkpoint]['path'], run.folder)}"
    header = run.header
    policies = {name: located(policy["path"], run.folder) for name, policy in header["policies"].items()}
    how = {"layers": header["options"]["layers"]}
    if header["identity"]["engine"]["as"] == "whole models":
        # What was evaluated: adapters folded into their base, in the type that the engine computes in.
        how |= {"as_": "full", "dtype": header["generation"]["dtype"]}
    return spec.merge.command(located(header["base"]["path"], run.folder), policies, "chosen", **how)


def _checked(run: Run, wish: _Wish) -> _Wish:
    """Return the wish with its default filled in.

    Raises:
        UserError: unknown names, an audit, none or several things to look for, or numbers that make no sense.
    """
    _check_names(run, wish)
    aims = sum([wish.maximize is not None, bool(wish.weights), wish.knee])
    left = [name for name in run.objectives if name not in wish.at_least]
    if not aims and wish.at_least and len(left) == 1:
        wish = replace(wish, maximize=left[0])
    elif aims != 1:
        rewards = ", ".join(run.objectives)
        raise fail(
            "say what to look for",
            where=str(run.folder),
            expected=f"exactly one of --maximize NAME, --weights NAME=W,NAME=W and --knee (rewards: {rewards})",
            got="more than one" if aims else "none",
        )
    _check_numbers(run, wish)
    return wish


def _check_names(run: Run, wish: _Wish) -> None:
    """Refuse rewards and methods that the run does not have, all of them at once."""
    problems = []
    asked = [*wish.at_least, *(wish.weights or {}), *([] if wish.maximize is None else [wish.maximize])]
    for name in dict.fromkeys(name for name in asked if name not in run.objectives):
        what, remedy = f"no reward `{name}`", did_you_mean(name, run.objectives)
        if name in run.rewards:
            what, remedy = f"`{name}` is an audit, which nothing is chosen by", "look at it in the answer"
        expected = "one of " + ", ".join(run.objectives)
        problems.append(Problem(what, where=str(run.folder), expected=expected, remedy=remedy))
    methods = list(run.methods())
    for name in (name for name in wish.methods if name not in methods):
        what = "SFT is no candidate" if name == SFT else f"no method `{name}`"
        remedy = did_you_mean(name, methods)
        problems.append(Problem(what, where=str(run.folder), expected=", ".join(methods), remedy=remedy))
    if problems:
        raise UserError(problems)


def _check_numbers(run: Run, wish: _Wish) -> None:
    """Refuse minima and weights that are not usable numbers, and --interpolate where no λ lies between two points."""
    if wrong := [f"{name}={bound:g}" for name, bound in wish.at_least.items() if not np.isfinite(bound)]:
        raise fail("not a minimum", where="--at-least", expected="finite numbers", got=", ".join(wrong))
    weights = wish.weights or {}
    fair = all(np.isfinite(weight) and weight >= 0 for weight in weights.values())
    if weights and not (fair and any(weights.values())):
        got = ", ".join(f"{name}={weight:g}" for name, weight in weights.items())
        raise fail("not weights", where="--weights", expected="numbers ≥ 0, one of them above 0", got=got)
    if wish.interpolate and wish.knee:
        raise fail("a knee is an evaluated point", where="--interpolate", remedy="leave it out, or use --maximize")
    policies = list(run.header["policies"])
    if wish.interpolate and len(policies) != 2:
        got = f"{len(policies)} ({', '.join(policies)})"
        raise fail("λ lies between two policies", where="--interpolate", expected="2 policies", got=got)

"""The verb `choose`: the evaluated policy that meets constraints best, and the command that makes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from rewarded_lines.config import SFT
from rewarded_lines.errors import Problem, UserError, did_you_mean, fail
from rewarded_lines.evaluation.paired_scores import Table, tabulate
from rewarded_lines.evaluation.points import PointSpec
from rewarded_lines.evaluation.records import Run, load_run
from rewarded_lines.fronts.bootstrap import LEVEL, Estimate, estimate_samples
from rewarded_lines.fronts.choice import Choice, best_under, best_weighted, knee
from rewarded_lines.fronts.interpolation import best_interpolated, interpolate
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
class Wish:
    """What is asked for; exactly one of `maximise`, `weights` and `knee`.

    Attributes:
        at_least: the least mean of a reward, in its unit.
        maximise: the reward to be as high as can be.
        weights: of the rewards, each standardized by mean and deviation of the SFT model's scores.
        knee: the point that gives up least of everything.
        methods: that may be chosen; all by default.
        interpolate: consider λ between evaluated ones, too (two policies).
    """

    at_least: Mapping[str, float]
    maximise: str | None = None
    weights: Mapping[str, float] | None = None
    knee: bool = False
    methods: Sequence[str] = ()
    interpolate: bool = False


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
    """Return the policy of a run that meets constraints best.

    Audits have no say. SFT is no candidate. With two rewards and a minimum for one, the other is maximized by default.

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
        UserError: the folder is no run, a reward or method is unknown, the wish is none or two at once, or no point
            meets every minimum; the message then names the nearest.
    """
    read = load_run(run)
    wish = _checked(read, Wish(dict(at_least or {}), maximize, weights, knee, methods, interpolate))
    return _Chooser(read, wish, level).choose()


class _Chooser:
    """One run and one wish."""

    def __init__(self, run: Run, wish: Wish, level: float) -> None:
        self._run, self._wish, self._level = run, wish, level
        self._table: Table = tabulate([run])
        # [1 + resamples, points, rewards]; row 0 is the data themselves.
        self._all = self._table.means[..., : len(self._table.rewards)]
        self._columns = self._table.objectives
        self._names = [self._table.rewards[index] for index in self._columns]
        sft = np.stack([run.sft.scores[name] for name in self._names], axis=1)
        spread = sft.std(axis=0)
        self._centre, self._scale = sft.mean(axis=0), np.where(spread > 0, spread, 1.0)
        self._minima = {self._names.index(name): bound for name, bound in wish.at_least.items()}

    def choose(self) -> Chosen:
        wanted = self._wish.methods or list(self._table.methods())
        groups = {name: rows for name, rows in self._table.methods().items() if name in wanted}
        rows = [row for group in groups.values() for row in group]
        qualified = [row for row in rows if self._short(row) == 0]
        best = self._best(qualified) if qualified else None
        if self._wish.interpolate:
            between = self._between(groups, best)
            if between is not None:
                return between
        if best is None:
            raise self._nothing(rows)
        return self._chosen(self._spec(best), self._all[:, best], False)

    def _best(self, rows: list[int]) -> int:
        means = self._all[0][rows][:, self._columns]
        if self._wish.knee:
            return rows[knee(means).index]
        return rows[self._by_rule(means).index]

    def _by_rule(self, means: np.ndarray) -> Choice:
        if self._wish.weights:
            return best_weighted(means, self._slopes(), centre=self._centre, scale=self._scale)
        assert self._wish.maximise is not None
        return best_under(means, self._minima, self._names.index(self._wish.maximise), scale=self._scale)

    def _slopes(self) -> list[float]:
        """Return the weight of each reward; one alone where it is to be maximized."""
        given = self._wish.weights or {self._wish.maximise or "": 1.0}
        return [float(given.get(name, 0.0)) for name in self._names]

    def _short(self, row: int) -> float:
        means = self._all[0, row][self._columns]
        lacks = [(bound - means[index]) / self._scale[index] for index, bound in self._minima.items()]
        return max([0.0, *lacks])

    def _between(self, groups: Mapping[str, list[int]], best: int | None) -> Chosen | None:
        """Return the optimum of a method's piecewise linear curve, if it is better than the best evaluated point."""
        found: list[tuple[float, str, float]] = []
        for name, rows in groups.items():
            specs = [self._spec(row) for row in rows]
            if len(rows) < 2 or not self._steady(specs):
                continue
            lams, means = [spec.weights[0] for spec in specs], self._all[0][rows][:, self._columns]
            optimum = best_interpolated(
                lams, means, self._slopes(), self._minima, centre=self._centre, scale=self._scale
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
            # It misses a minimum by rounding only.
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
        means = self._all[0, row][self._columns]
        return float((np.array(self._slopes()) * (means - self._centre) / self._scale).sum())

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
            aim = f"most {wish.maximise}"
        return aim + (" with " + ", ".join(bounds) if bounds else "")

    def _nothing(self, rows: list[int]) -> UserError:
        """Say that nothing qualifies, and what comes nearest."""
        means = self._all[0][rows][:, self._columns]
        choice = best_under(means, self._minima, 0, scale=self._scale)
        spec = self._spec(rows[choice.index])
        values = self._all[0, rows[choice.index]][self._columns]
        reached = ", ".join(f"{self._names[index]} = {values[index]:.4g}" for index in choice.shortfalls)
        between = "" if self._wish.interpolate else "look between the points with --interpolate, "
        return fail(
            "no evaluated policy meets every minimum",
            where=str(self._run.folder),
            expected=", ".join(f"{name} ≥ {bound:g}" for name, bound in self._wish.at_least.items()),
            got=f"the nearest is {spec}, with {reached}",
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


def _checked(run: Run, wish: Wish) -> Wish:
    """Return the wish with its default filled in.

    Raises:
        UserError: unknown names, an audit, not exactly one aim, or one that makes no sense.
    """
    _check_names(run, wish)
    aims = [wish.maximise is not None, bool(wish.weights), wish.knee]
    left = [name for name in run.objectives if name not in wish.at_least]
    if not any(aims) and wish.at_least and len(left) == 1:
        wish = replace(wish, maximise=left[0])
    elif sum(aims) != 1:
        raise fail(
            "say what to look for",
            where=str(run.folder),
            expected=f"exactly one of --maximize NAME, --weights NAME=W,NAME=W and --knee (rewards: "
            f"{', '.join(run.objectives)})",
            got="none" if not any(aims) else "more than one",
        )
    _check_sense(run, wish)
    return wish


def _check_names(run: Run, wish: Wish) -> None:
    """Refuse rewards and methods that the run does not have, all of them at once."""
    asked = [*wish.at_least, *(wish.weights or {}), *([wish.maximise] if wish.maximise is not None else [])]
    problems = [_unknown_reward(run, name) for name in dict.fromkeys(asked) if name not in run.objectives]
    methods = list(run.methods())
    for name in wish.methods:
        if name not in methods:
            remedy = did_you_mean(name, methods)
            what = "SFT is no candidate" if name == SFT else f"no method `{name}`"
            problems.append(Problem(what, where=str(run.folder), expected=", ".join(methods), remedy=remedy))
    if problems:
        raise UserError(problems)


def _check_sense(run: Run, wish: Wish) -> None:
    """Refuse numbers that are none, and a look between points where there is nothing between."""
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


def _unknown_reward(run: Run, name: str) -> Problem:
    known = run.objectives
    if name in run.rewards:
        what, remedy = f"`{name}` is an audit, which nothing is chosen by", "look at it in the answer"
    else:
        what, remedy = f"no reward `{name}`", did_you_mean(name, known)
    return Problem(what, where=str(run.folder), expected="one of " + ", ".join(known), remedy=remedy)

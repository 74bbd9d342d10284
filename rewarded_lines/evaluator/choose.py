"""The verb `choose`: the evaluated policy that meets constraints best, and the command that makes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from rewarded_lines.errors import UserError, fail
from rewarded_lines.evaluator.missing_scores import Missing, missing_json
from rewarded_lines.evaluator.paired_scores import tabulate
from rewarded_lines.evaluator.points import PointSpec
from rewarded_lines.evaluator.recorded_choices import CHOSEN, check_name, record_choice
from rewarded_lines.evaluator.records import Run, load_run, mixtures_of
from rewarded_lines.evaluator.wishes import Wish, checked_wish
from rewarded_lines.merger.methods import MOD
from rewarded_lines.merger.preferences import Weights, preference_text
from rewarded_lines.pareto.bootstrap import LEVEL, Estimate, estimate_samples
from rewarded_lines.pareto.choice import Choice, best_candidate, knee
from rewarded_lines.pareto.interpolation import InterpolatedChoice, best_interpolated, interpolate
from rewarded_lines.references import located

NOTE = (
    "The choice was made by these same scores, so they lie a little high: the best of many is also the luckiest. "
    "Scores on fresh prompts (`rewarded-lines score`) do not."
)
# Weights in records have 12 decimals, and users round.
_SAME = 1e-6


@dataclass(frozen=True)
class Chosen:
    """The policy to ship.

    Attributes:
        point: method, weights and schedule.
        interpolated: whether λ lies between evaluated ones, so that the scores are a guess.
        scores: the expected mean of every reward, audits too, with its interval over prompts.
        meets: by reward with a minimum, the share of resamples that meet it.
        rule: the constraints and the aim, in words.
        command: makes the policy.
        missing: the rewards that lack scores in the run, with the counts.
        preference: μ by reward, where the policies were trained for mixtures.
        policies: their names, in the order of the weights.
        name: the name under which the run folder remembers it; "" if it does not.
    """

    point: PointSpec
    interpolated: bool
    scores: dict[str, Estimate]
    meets: dict[str, float]
    rule: str
    command: str
    missing: dict[str, Missing] = field(default_factory=dict)
    preference: dict[str, float] = field(default_factory=dict)
    policies: Sequence[str] = ()
    name: str = ""

    def as_dict(self) -> dict[str, object]:
        """Return the choice for JSON."""
        left = "point", "missing", "preference", "policies"
        return {
            **self.point.as_dict(),
            **{name: value for name, value in vars(self).items() if name not in left},
            "scores": {name: vars(score) for name, score in self.scores.items()},
            **({"preference": self.preference} if self.preference else {}),
            **missing_json(self.missing),
            "note": NOTE,
        }


def choose(
    run: Path | str,
    *,
    at_least: Mapping[str, float] | None = None,
    at_least_sft: bool = False,
    maximize: str | None = None,
    weights: Mapping[str, float] | None = None,
    knee: bool = False,
    preference: Weights | None = None,
    methods: Sequence[str] = (),
    interpolate: bool = False,
    name: str | None = CHOSEN,
    level: float = LEVEL,
) -> Chosen:
    """Return the policy of a run that meets constraints best.

    Pass one of `maximize`, `weights`, `preference` and `knee`. Audits do not count, and SFT and controls while
    decoding (`mod`) are no candidates. With two rewards and a minimum for one, the other is maximized by default.

    Args:
        run: the run folder that `sweep` wrote.
        at_least: the least mean score by reward, in its unit.
        at_least_sft: every other reward must reach SFT's mean.
        maximize: the reward to maximize.
        weights: w by reward, others 0; maximizes Σ_i w_i (s_i − c_i)/d_i of the mean scores s, where c and d are mean
            and standard deviation of SFT's scores.
        knee: take the point of the front that gives up least of everything.
        preference: μ over the rewards of the project's `mixtures:`; takes λ = B⁻¹μ, with the method best for w = μ.
        methods: to choose among; all by default.
        interpolate: with two policies, also try λ between evaluated ones, where scores are taken to be linear.
        name: the run folder remembers the point by it, and `serve` answers requests by it; None: it does not.
        level: of the intervals.

    Raises:
        UserError: the folder is not a run, a reward or method is unknown, there is not one aim, or no point meets every
            minimum or has the preference; the message names the nearest.
    """
    if name is not None:
        check_name(name)
    read = load_run(run)
    wish = checked_wish(read, Wish(dict(at_least or {}), maximize, weights, knee, methods, interpolate, preference))
    if at_least_sft:
        wish = replace(wish, at_least=_sft_means(read) | dict(wish.at_least))
    chosen = _Chooser(read, wish, level).choose()
    facts = {"rule": chosen.rule, "means": {reward: score.value for reward, score in chosen.scores.items()}}
    recorded = name is not None and record_choice(read.folder, name, chosen.point, facts)
    return replace(chosen, name=name) if name and recorded else chosen


def _sft_means(run: Run) -> dict[str, float]:
    # As `tabulate` averages them, so that a point with SFT's scores reaches them.
    means = tabulate([run]).means[0, 0]
    return {name: float(means[list(run.rewards).index(name)]) for name in run.objectives}


class _Chooser:
    """Chooses among the points of one run."""

    def __init__(self, run: Run, wish: Wish, level: float) -> None:
        self._run, self._wish, self._level = run, wish, level
        self._table = tabulate([run])
        # [1 + resamples, points, rewards]; row 0 is measured.
        self._all = self._table.means[..., : len(self._table.rewards)]
        # [points, objectives]
        self._means = self._all[0][:, self._table.objectives]
        names = [self._table.rewards[index] for index in self._table.objectives]
        sft = np.stack([run.sft.scores[name] for name in names], axis=1)
        spread = np.nanstd(sft, axis=0)
        self._units = {"centre": np.nanmean(sft, axis=0), "scale": np.where(spread > 0, spread, 1.0)}
        self._minima = {names.index(name): bound for name, bound in wish.at_least.items()}
        # A single reward to maximize has the weight 1. For a knee, these find the nearest point.
        self._mixtures = mixtures_of(run)
        given = wish.weights or wish.preference or {wish.maximize or names[0]: 1.0}
        self._weights = [float(given.get(name, 0.0)) for name in names]
        self._names = names

    def choose(self) -> Chosen:
        methods = self._table.methods()
        groups = [rows for name, rows in methods.items() if name in self._wish.methods]
        rows = self._preferred(np.concatenate(groups))
        means = self._means[rows]
        found = best_candidate(means, self._weights, self._minima, **self._units)
        best = rows[found.index]
        if found.qualifies and self._wish.knee:
            meets = [(means[:, at] >= bound) for at, bound in self._minima.items()]
            rows = rows[np.all(meets, axis=0)] if meets else rows
            best = rows[knee(self._means[rows])]
        if self._wish.interpolate and (between := self._between(groups, found)):
            return between
        if not found.qualifies:
            raise self._nothing(best, found.shortfalls)
        return self._chosen(self._spec(best), self._all[:, best], False)

    def _preferred(self, rows: np.ndarray) -> np.ndarray:
        """Return the rows with the preference that was asked for, or all without one."""
        if self._wish.preference is None:
            return rows
        asked = np.array(list(self._wish.preference.values()))
        places = {row: self._place(self._spec(row)) for row in rows}
        far = {row: np.abs(np.array(list(at.values())) - asked).max() for row, at in places.items() if at}
        if found := [row for row, distance in far.items() if distance <= _SAME]:
            return np.array(found)
        text = ",".join(f"{name}={share:g}" for name, share in self._wish.preference.items())
        nearest = f"the nearest is {preference_text(places[min(far, key=far.__getitem__)])}" if far else "none"
        raise fail(
            "no evaluated policy has this preference",
            where=str(self._run.folder),
            expected=preference_text(self._wish.preference),
            got=nearest,
            remedy=f"ask for that one, add points with `sweep --points`, or use `merge --preference {text}`",
        )

    def _place(self, spec: PointSpec) -> dict[str, float]:
        """Return μ of a point, {} if it is not known."""
        return self._mixtures.preference(spec.weights) if self._mixtures and spec.weights and not spec.edit else {}

    def _between(self, groups: Sequence[list[int]], evaluated: Choice) -> Chosen | None:
        """Return the optimum of the methods' curves, if it beats the best evaluated point."""
        found: list[tuple[InterpolatedChoice, list[int]]] = []
        for rows in groups:
            if len(rows) > 1 and _is_curve([self._spec(row) for row in rows]):
                lams = [self._spec(row).weights[0] for row in rows]
                optimum = best_interpolated(lams, self._means[rows], self._weights, self._minima, **self._units)
                found += [(optimum, rows)] if optimum.qualifies else []
        if not found:
            return None
        best, rows = max(found, key=lambda one: one[0].value)
        if evaluated.qualifies and evaluated.value >= best.value - 1e-12:
            return None
        lams = [self._spec(row).weights[0] for row in rows]
        if best.lam in lams:
            # The evaluated point misses a minimum by rounding only.
            row = rows[lams.index(best.lam)]
            return self._chosen(self._spec(row), self._all[:, row], False)
        first = self._spec(rows[0])
        spec = replace(first, merge=replace(first.merge, weights=(best.lam, 1.0 - best.lam)))
        return self._chosen(spec, interpolate(lams, self._all[:, rows], best.lam), True)

    def _spec(self, row: int) -> PointSpec:
        return self._table.rows[row][0].spec

    def _chosen(self, spec: PointSpec, samples: np.ndarray, interpolated: bool) -> Chosen:
        rewards = self._table.rewards
        scores = {name: estimate_samples(samples[:, index], self._level) for index, name in enumerate(rewards)}
        meets = {
            name: float((samples[1:, rewards.index(name)] >= bound).mean())
            for name, bound in self._wish.at_least.items()
        }
        command, names = command_for(self._run, spec), list(self._run.header["policies"])
        told = self._rule(), command, self._run.missing, self._place(spec), names
        return Chosen(spec, interpolated, scores, meets, *told)

    def _bounds(self) -> list[str]:
        return [f"{name} ≥ {bound:g}" for name, bound in self._wish.at_least.items()]

    def _rule(self) -> str:
        aim = f"most {self._wish.maximize}"
        if self._wish.preference is not None:
            aim = f"the preference {preference_text(self._wish.preference)}"
        elif self._wish.knee:
            aim = "the knee of the front"
        elif self._wish.weights:
            terms = (f"{weight:g}·{name}" for name, weight in self._wish.weights.items())
            aim = f"most of {' + '.join(terms)} (standardized)"
        return aim + (" with " + ", ".join(bounds) if (bounds := self._bounds()) else "")

    def _nothing(self, nearest: int, shortfalls: Mapping[int, float]) -> UserError:
        """Return the error that no point qualifies, with the nearest one."""
        reached = ", ".join(f"{self._names[at]} = {self._means[nearest, at]:.4g}" for at in shortfalls)
        between = "" if self._wish.interpolate else "look between the points with --interpolate, "
        return fail(
            "no evaluated policy meets every minimum",
            where=str(self._run.folder),
            expected=", ".join(self._bounds()),
            got=f"the nearest is {self._spec(nearest)}, with {reached}",
            remedy=f"lower a minimum, {between}or add points with `search`",
        )


def _is_curve(specs: Sequence[PointSpec]) -> bool:
    """True if one schedule holds for every λ of two policies, so that λ in between exist."""
    first = specs[0].merge
    alike = all(replace(spec.merge, weights=first.weights) == first for spec in specs)
    return alike and all(len(spec.weights) == 2 and not spec.checkpoint for spec in specs)


def command_for(run: Run, spec: PointSpec) -> str:
    """Return the command that makes a point's policy; a comment for an existing model and for `mod`."""
    if spec.merge.method == MOD:
        return f"# nothing to merge: {spec} mixes the policies while they decode"
    if spec.checkpoint:
        known = {**run.header["policies"], **run.header["baselines"]}
        return f"# nothing to merge: {located(known[spec.checkpoint]['path'], run.folder)}"
    header = run.header
    policies = {name: located(policy["path"], run.folder) for name, policy in header["policies"].items()}
    how = {name: header["options"].get(name, "auto") for name in ("tokenizer", "config_from")}
    how |= {name: header["options"].get(name) for name in ("layers", "tower")}
    if how["tokenizer"] not in ("auto", "base", *policies):
        how["tokenizer"] = located(how["tokenizer"], run.folder)
    if header["identity"]["engine"]["as"] == "whole models":
        # The sweep evaluated adapters folded into their base, in the engine's dtype.
        how |= {"as_": "full", "dtype": header["generation"]["dtype"]}
    return spec.merge.command(located(header["base"]["path"], run.folder), policies, "chosen", **how)

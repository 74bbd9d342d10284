"""The numbers of a run: means, hypervolumes and differences, each with an interval.

Every interval is a percentile bootstrap over prompts, with the same resamples for all points.
It shows how far a number would move with other prompts; missing scores are left out, see `missing_scores`.
Several runs of one project, which differ in their training seed, are resampled too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from rewarded_lines.config import POLICIES, SFT
from rewarded_lines.data.words import distinct2
from rewarded_lines.evaluator.missing_scores import Missing, missing_json
from rewarded_lines.evaluator.paired_scores import SEED, Table, control_perplexities, tabulate
from rewarded_lines.evaluator.points import PointSpec
from rewarded_lines.evaluator.records import Run, mixtures_of, total_missing
from rewarded_lines.merger.lines_schedule import mean_line
from rewarded_lines.merger.preferences import Mixtures
from rewarded_lines.merger.schedule_forms import FORMS, recorded_schedule
from rewarded_lines.merger.spec import MergeSpec
from rewarded_lines.pareto.bootstrap import LEVEL, Estimate, estimate_samples
from rewarded_lines.pareto.comparison import MethodVolume, VolumeDifference, compare, method_volumes, sample_volumes
from rewarded_lines.progress import SILENT, Progress
from rewarded_lines.reports.detectable import Detectable, detectable, read_size
from rewarded_lines.reports.kl_budgets import KlBudget, kl_budgets


@dataclass(frozen=True)
class PointSummary:
    """One point: mean scores in the rewards' units, KL to SFT in nats, response length in words.

    Attributes:
        merge: its α and β are averages over the runs.
        ended: share of the responses that end before the token limit.
        perplexities: of each set of control texts.
        forgetting: these perplexities divided by SFT's, paired by text.
        contribution: hypervolume above SFT that the method would lose without this point.
        missing: the rewards that have no score for some responses, with the counts over the runs.
        preference: μ = Bλ by reward, where the policies were trained for mixtures.
    """

    method: str
    weights: tuple[float, ...]
    merge: MergeSpec
    checkpoint: str
    rewards: dict[str, Estimate]
    kl: Estimate
    words: Estimate
    ended: float
    distinct2: float
    perplexities: dict[str, Estimate]
    forgetting: dict[str, Estimate]
    contribution: float
    edit: bool = False
    missing: dict[str, Missing] = field(default_factory=dict)
    preference: dict[str, float] = field(default_factory=dict)

    @property
    def place(self) -> tuple[float, ...]:
        """Where the point lies on the simplex: μ if it is known, else λ; empty for a model that is not merged."""
        return tuple(self.preference.values()) or self.weights

    @property
    def lam(self) -> float | None:
        """The first policy's weight λ, or the first reward's μ; None for a model that is not merged."""
        return self.place[0] if self.place else None

    def as_dict(self) -> dict[str, Any]:
        """Return the point as `summary.json` holds it."""
        merge = self.merge
        first = {"method": self.method, **merge.schedule.as_dict(), "merge": merge.method}
        left = (*first, "missing", *([] if self.preference else ["preference"]))
        given = {key: value for key, value in asdict(self).items() if key not in left}
        return first | given | missing_json(self.missing)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> PointSummary:
        """Return the point that `as_dict` wrote."""
        fields = {key: value for key, value in content.items() if key not in FORMS}
        weights = tuple(fields.pop("weights"))
        merged = (1.0,) if fields.get("edit") else weights
        merge = MergeSpec(merged, method=fields.pop("merge"), **recorded_schedule(content, len(merged)))
        fields |= {name: Estimate(**fields[name]) for name in ("kl", "words")}
        for name in ("rewards", "perplexities", "forgetting"):
            fields[name] = {key: Estimate(**one) for key, one in fields[name].items()}
        fields["missing"] = {key: Missing(**one) for key, one in fields.get("missing", {}).items()}
        return cls(weights=weights, merge=merge, **fields)


@dataclass(frozen=True)
class PolicyGain:
    """Mean score of an unmerged policy minus SFT's for each reward, paired by prompt."""

    policy: str
    rewards: dict[str, Estimate]


@dataclass(frozen=True)
class Summary:
    """The content of `report/summary.json`; `runs` is the number of averaged runs, `resamples` are those used."""

    title: str
    runs: int
    prompts: int
    rewards: dict[str, str]
    audits: list[str]
    policies: list[str]
    missing_points: int
    resamples: int
    seed: int
    level: float
    generation: dict[str, Any]
    tuned: dict[str, Any] | None
    references: dict[str, dict[str, float]]
    points: list[PointSummary]
    hypervolumes: list[MethodVolume]
    differences: list[VolumeDifference] = field(default_factory=list)
    policy_gains: list[PolicyGain] = field(default_factory=list)
    missing: dict[str, Missing] = field(default_factory=dict)
    exact_contributions: bool = True
    power: list[Detectable] = field(default_factory=list)
    kl_budgets: list[KlBudget] = field(default_factory=list)

    @property
    def objectives(self) -> dict[str, str]:
        """The units of the rewards that form the front: all rewards except audits."""
        return {name: unit for name, unit in self.rewards.items() if name not in self.audits}

    @property
    def sft(self) -> PointSummary:
        """The point of the SFT model."""
        return next(point for point in self.points if point.method == SFT)

    @property
    def controls(self) -> list[str]:
        """Names of the sets of control texts."""
        return list(self.points[0].perplexities)

    def methods(self) -> dict[str, list[PointSummary]]:
        """Return the points of each method in the order of λ, without the SFT model."""
        found: dict[str, list[PointSummary]] = {}
        for point in self.points:
            if point.method != SFT:
                found.setdefault(point.method, []).append(point)
        return found

    def merged_methods(self) -> dict[str, list[PointSummary]]:
        """Return the points of each method that forms a front: all but single policies."""
        return {name: points for name, points in self.methods().items() if name != POLICIES}

    def policy_points(self) -> list[tuple[PointSummary, str]]:
        """Return each policy that was evaluated unmerged: its first point and its name."""
        found = []
        for index, name in enumerate(self.policies):
            alone = [point for point in self.points if is_policy(point, index)]
            found += [(point, name) for point in alone[:1]]
        return found

    def as_dict(self) -> dict[str, Any]:
        """Return the summary for JSON."""
        content = {key: value for key, value in asdict(self).items() if key != "missing"}
        content["points"] = [point.as_dict() for point in self.points]
        # Only where something is approximated, or was asked for.
        if self.exact_contributions:
            del content["exact_contributions"]
        if not self.power:
            del content["power"]
        if not self.kl_budgets:
            del content["kl_budgets"]
        budgets = content.get("kl_budgets", [])
        for row in [*content["hypervolumes"], *(row for one in budgets for row in one["hypervolumes"])]:
            for error in ("error", "resample_error"):
                if not row[error]:
                    del row[error]
        return content | missing_json(self.missing)


def summarise(
    runs: Run | Sequence[Run],
    *,
    resamples: int | None = None,
    exact: bool = False,
    power: bool | float | str = False,
    max_kl: Sequence[float] = (),
    progress: Progress = SILENT,
) -> Summary:
    """Return the numbers of a run, or averages over several runs, with their intervals.

    Runs may be unfinished; only points that all of them have are compared.

    Args:
        runs: one, or several of one project.
        resamples: by default as many as the project asks for.
        exact: approximate no hypervolume, however long it takes; see `sample_volumes`.
        power: also say how small a difference could be found, and what one needs; see `read_size`.
        max_kl: also compare at equal KL, within each of so many nats; see `kl_budgets`.

    Raises:
        UserError: the points answer different prompts, a score is not finite, or `power` asks for what cannot be.
    """
    size_of = read_size(power)
    runs = [runs] if isinstance(runs, Run) else list(runs)
    first = runs[0]
    table, policies = tabulate(runs, resamples), list(first.header.get("policies", {}))
    references = table.references(first.header.get("sweep", {}).get("references", {}))
    volumes = sample_volumes(table.fronts(), references, table.samples.drawn, exact=exact, progress=progress)
    shares, exact_shares = table.contributions(exact)
    objectives = [table.rewards[index] for index in table.objectives]
    return Summary(
        title=str(first.header.get("title", "")),
        runs=len(runs),
        prompts=len(np.unique(first.sft.prompt_index)),
        rewards=first.rewards,
        audits=[name for name in first.rewards if name not in first.objectives],
        policies=policies,
        missing_points=len(first.header["points"]) - len(table.rows),
        resamples=len(table.samples.means) - 1,
        seed=SEED,
        level=LEVEL,
        generation=dict(first.header.get("generation", {})),
        tuned=first.header.get("tuned"),
        references={
            name: dict(zip(objectives, at[0].mean(axis=0).tolist(), strict=True)) for name, at in references.items()
        },
        points=_points(table, shares, first, mixtures_of(first)),
        hypervolumes=method_volumes(volumes),
        differences=compare(volumes),
        policy_gains=_policy_gains(table, policies),
        missing=total_missing([point for row in table.rows for point in row]),
        exact_contributions=exact_shares,
        power=detectable(table, volumes, runs, size_of),
        kl_budgets=kl_budgets(table, max_kl, exact=exact, progress=progress),
    )


def _points(table: Table, shares: np.ndarray, run: Run, mixtures: Mixtures | None) -> list[PointSummary]:
    means = table.means
    controls = control_perplexities(table, run)
    points = []
    for index, row in enumerate(table.rows):
        *scores, kl, words = (estimate_samples(column) for column in means[:, index].T)
        spec = row[0].spec
        points.append(
            PointSummary(
                method=spec.method,
                weights=spec.weights,
                merge=_average_merge([point.spec.merge for point in row]),
                checkpoint=spec.checkpoint,
                rewards=dict(zip(table.rewards, scores, strict=True)),
                kl=kl,
                words=words,
                ended=float(np.mean([np.mean(point.ended) for point in row])),
                distinct2=float(np.mean([distinct2(point.judged) for point in row])),
                perplexities={name: estimate_samples(at[:, index]) for name, at in controls.items()},
                forgetting={name: estimate_samples(at[:, index] / at[:, 0]) for name, at in controls.items()},
                contribution=float(shares[index]),
                edit=spec.edit,
                missing=total_missing(row),
                preference=mixtures.preference(spec.weights) if mixtures and spec.weights and not spec.edit else {},
            )
        )
    return points


def _average_merge(merges: Sequence[MergeSpec]) -> MergeSpec:
    """Return the mean schedule of a point; a matched or tuned schedule differs between runs."""
    schedules = [merge.schedule for merge in merges]
    policies = range(max(len(one.lines) for one in schedules))
    return replace(merges[0], lines=tuple(mean_line([one.line(policy) for one in schedules]) for policy in policies))


def _policy_gains(table: Table, policies: Sequence[str]) -> list[PolicyGain]:
    gains = []
    for index, policy in enumerate(policies):
        place = next((place for place, row in enumerate(table.rows) if is_policy(row[0].spec, index)), None)
        if place is not None:
            change = table.change(place, 0)
            scores = {name: estimate_samples(change[:, k]) for k, name in enumerate(table.rewards)}
            gains.append(PolicyGain(policy, scores))
    return gains


def is_policy(point: PointSpec | PointSummary, index: int) -> bool:
    """True if a point is policy `index` itself: all weight on it, scale 1 at every depth."""
    if not point.weights or point.merge.method != "soup" or point.merge.scaled:
        return False
    return point.weights == tuple(float(place == index) for place in range(len(point.weights)))

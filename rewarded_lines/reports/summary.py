"""From the records of runs to their numbers: means, hypervolumes and differences, each with an interval.

Every interval is a percentile bootstrap over prompts, with the same resamples for all points: it says how far a number
would move with other prompts. Several runs of one project, with policies of other training seeds, are resampled too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from rewarded_lines.config import POLICIES, SFT
from rewarded_lines.evaluator.paired_scores import SEED, Table, control_sets, perplexity, resamples_of, tabulate
from rewarded_lines.evaluator.points import PointSpec
from rewarded_lines.evaluator.records import Point, Run
from rewarded_lines.merger.spec import MergeSpec
from rewarded_lines.pareto.bootstrap import LEVEL, Estimate, estimate_samples, resample_runs, run_average
from rewarded_lines.pareto.comparison import MethodVolume, VolumeDifference, compare, method_volumes, sample_volumes
from rewarded_lines.pareto.hypervolume import contributions


@dataclass(frozen=True)
class PointSummary:
    """One point: mean scores in the rewards' units, KL to the SFT model in nats, response length in words.

    `weights` are the point's place on its curve, see `PointSpec`; α and β of its `merge` are averages over the runs.
    `ended` is the share of responses that end by themselves. `distinct2`: see the function of this name.
    `perplexities` are those of the sets of control texts, `forgetting` those over the SFT model's, paired by text.
    `contribution` is what the hypervolume of its method above SFT would lose without the point.
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

    @property
    def lam(self) -> float | None:
        """The first policy's weight, λ; None for a model that is not merged."""
        return self.weights[0] if self.weights else None

    def as_dict(self) -> dict[str, Any]:
        """Return the point as `summary.json` has it, the merge's numbers among the others."""
        merge = self.merge
        told = {"method": self.method, "alpha": merge.alpha, "beta": merge.beta, "merge": merge.method}
        return told | {name: value for name, value in asdict(self).items() if name not in told}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> PointSummary:
        """Return the point that `as_dict` described."""
        told = dict(content)
        weights = tuple(told.pop("weights"))
        merged = (1.0,) if told.get("edit") else weights
        merge = MergeSpec(merged, told.pop("alpha"), told.pop("beta"), told.pop("merge"))
        told |= {name: Estimate(**told[name]) for name in ("kl", "words")}
        for name in ("rewards", "perplexities", "forgetting"):
            told[name] = {key: Estimate(**one) for key, one in told[name].items()}
        return cls(weights=weights, merge=merge, **told)


@dataclass(frozen=True)
class PolicyGain:
    """Paired mean difference between a policy itself, unmerged, and the SFT model, on every reward."""

    policy: str
    rewards: dict[str, Estimate]


@dataclass(frozen=True)
class Summary:
    """The numbers of a run, as `report/summary.json` holds them; `runs` counts those that were averaged."""

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

    @property
    def objectives(self) -> dict[str, str]:
        """The rewards that make the front, with their units: all but those of the role `audit`."""
        return {name: unit for name, unit in self.rewards.items() if name not in self.audits}

    @property
    def sft(self) -> PointSummary:
        """The SFT model's own point."""
        return next(point for point in self.points if point.method == SFT)

    @property
    def controls(self) -> list[str]:
        """The names of the sets of control texts."""
        return list(self.points[0].perplexities)

    def methods(self) -> dict[str, list[PointSummary]]:
        """Return the points by method, in the order of λ; the SFT model is none of them."""
        names = dict.fromkeys(point.method for point in self.points if point.method != SFT)
        return {name: [point for point in self.points if point.method == name] for name in names}

    def merged_methods(self) -> dict[str, list[PointSummary]]:
        """Return the methods that make a front, with their points: all but the single policies."""
        return {name: points for name, points in self.methods().items() if name != POLICIES}

    def policy_points(self) -> list[tuple[PointSummary, str]]:
        """Return the point of each policy that was evaluated unmerged, with the policy's name."""
        found = [next((point for point in self.points if is_policy(point, i)), None) for i in range(len(self.policies))]
        return [(point, name) for point, name in zip(found, self.policies, strict=True) if point is not None]

    def as_dict(self) -> dict[str, Any]:
        """Return the summary as what JSON can hold."""
        return {**asdict(self), "points": [point.as_dict() for point in self.points]}


def summarise(runs: Run | Sequence[Run], seed: int = SEED, level: float = LEVEL) -> Summary:
    """Return the numbers of a run, or the average of several.

    Args:
        runs: finished or unfinished; methods are compared on the points that all of them have.
        seed: of the bootstrap.
        level: of every interval.

    Raises:
        UserError: points answered different prompts, or scores are not finite.
    """
    runs = [runs] if isinstance(runs, Run) else list(runs)
    first = runs[0]
    table, policies = tabulate(runs, seed), list(first.header.get("policies", {}))
    references = _references(table, first.header.get("sweep", {}).get("references", {}))
    fronts = {name: table.samples.means[:, :, rows][..., table.objectives] for name, rows in table.methods().items()}
    volumes = sample_volumes(fronts, references, table.samples.drawn)
    objectives = [table.rewards[index] for index in table.objectives]
    return Summary(
        title=str(first.header.get("title", "")),
        runs=len(runs),
        prompts=len(np.unique(first.sft.prompt_index)),
        rewards=first.rewards,
        audits=[name for name in first.rewards if name not in first.objectives],
        policies=policies,
        missing_points=len(first.header["points"]) - len(table.rows),
        resamples=resamples_of(first),
        seed=seed,
        level=level,
        generation=dict(first.header.get("generation", {})),
        tuned=first.header.get("tuned"),
        references={
            name: dict(zip(objectives, at[0].mean(axis=0).tolist(), strict=True)) for name, at in references.items()
        },
        points=_points(table, references["sft"], _control_sets(first), seed, level),
        hypervolumes=method_volumes(volumes, level),
        differences=compare(volumes, level),
        policy_gains=_policy_gains(table, policies, level),
    )


def _references(table: Table, declared: Mapping[str, Mapping[str, float]]) -> dict[str, np.ndarray]:
    """Return each reference point in every run and resample, [1 + resamples, runs, objectives].

    "sft" and "worst" are statistics of the same prompts as the points, so each resample has its own: the SFT model's
    mean scores, and the worst mean score of any point, SFT included, on each axis. Declared references are constant.
    """
    scores = table.samples.means[..., table.objectives]
    names = [table.rewards[index] for index in table.objectives]
    fixed = {
        label: np.broadcast_to([at[name] for name in names], scores[:, :, 0].shape) for label, at in declared.items()
    }
    return {"sft": scores[:, :, 0], "worst": scores.min(axis=2), **fixed}


def _points(table: Table, sft: np.ndarray, control: Mapping[str, slice], seed: int, level: float) -> list[PointSummary]:
    means, shares = table.means, np.zeros(len(table.rows))
    for rows in table.methods().values():
        fronts = table.samples.means[0][:, rows][..., table.objectives]
        shares[rows] = np.mean([contributions(*one) for one in zip(fronts, sft[0], strict=True)], axis=0)
    found = {name: _perplexities(table, texts, seed, means.shape[0] - 1) for name, texts in control.items()}
    controls = {name: values for name, values in found.items() if values is not None}
    points = []
    for index, row in enumerate(table.rows):
        *scores, kl, words = (estimate_samples(column, level) for column in means[:, index].T)
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
                perplexities={name: estimate_samples(at[:, index], level) for name, at in controls.items()},
                forgetting={name: estimate_samples(at[:, index] / at[:, 0], level) for name, at in controls.items()},
                contribution=float(shares[index]),
                edit=spec.edit,
            )
        )
    return points


def _average_merge(merges: Sequence[MergeSpec]) -> MergeSpec:
    """Return the merge of a point in several runs: a matched or tuned schedule may differ between them."""
    alpha, beta = (float(np.mean([getattr(merge, name) for merge in merges])) for name in ("alpha", "beta"))
    return replace(merges[0], alpha=alpha, beta=beta)


def distinct2(responses: Iterable[str]) -> float:
    """Return the share of different pairs of neighbouring words among all such pairs; 0 where there are none.

    Source: Li et al., "A Diversity-Promoting Objective Function for Neural Conversation Models", 2016.
    """
    pairs = [pair for text in responses for words in [text.split()] for pair in zip(words, words[1:], strict=False)]
    return len(set(pairs)) / len(pairs) if pairs else 0.0


def _control_sets(run: Run) -> dict[str, slice]:
    """Return where each set of control texts stands among all of a point's."""
    if run.sft.control is None:
        return {}
    counts = control_sets(run)
    ends = np.cumsum(list(counts.values())).tolist()
    return {name: slice(end - count, end) for (name, count), end in zip(counts.items(), ends, strict=True)}


def _perplexities(table: Table, texts: slice, seed: int, resamples: int) -> np.ndarray | None:
    """Return the perplexity of some control texts at each point, [1 + resamples of the texts, points].

    It is None where no token is predicted at some point.
    """
    sums = [[_predicted(point, texts) for point in row] for row in table.rows]
    if not all(len(one) for row in sums for one in row):
        return None
    runs = [np.stack([row[index] for row in sums]) for index in range(len(sums[0]))]
    samples = resample_runs(runs, resamples, seed)
    return np.asarray(run_average(perplexity(samples.means), samples.drawn))


def _predicted(point: Point, texts: slice) -> np.ndarray:
    """Return the sums of the control texts of which at least one token is predicted."""
    sums = np.zeros((0, 2)) if point.control is None else point.control[texts]
    return sums[sums[:, 1] > 0]


def _policy_gains(table: Table, policies: Sequence[str], level: float) -> list[PolicyGain]:
    """Compare each policy that was evaluated unmerged with SFT."""
    gains = []
    for index, policy in enumerate(policies):
        place = next((place for place, row in enumerate(table.rows) if is_policy(row[0].spec, index)), None)
        if place is not None:
            change = table.means[:, place] - table.means[:, 0]
            scores = {name: estimate_samples(change[:, k], level) for k, name in enumerate(table.rewards)}
            gains.append(PolicyGain(policy, scores))
    return gains


def is_policy(point: PointSpec | PointSummary, index: int) -> bool:
    """Tell whether a point is policy `index` itself: all weight on it, scale 1 at every depth."""
    one_hot = tuple(float(place == index) for place in range(len(point.weights)))
    plain = point.merge.method == "soup" and not point.merge.scaled
    return bool(point.weights) and plain and point.weights == one_hot

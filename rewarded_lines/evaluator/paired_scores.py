"""The records of runs as arrays, paired prompt by prompt, and their resamples.

A mean is over the prompts that have a score, and so is every resampled one; see `missing_scores`.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from rewarded_lines.config import CONTROL, SFT
from rewarded_lines.errors import Problem, UserError, fail
from rewarded_lines.evaluator.missing_scores import prompt_means, too_few
from rewarded_lines.evaluator.points import PointSpec
from rewarded_lines.evaluator.records import Point, Run
from rewarded_lines.merger.preferences import preference_text
from rewarded_lines.pareto.approximate_hypervolume import affordable_contributions
from rewarded_lines.pareto.bootstrap import RunSamples, resample_runs, run_average

SEED = 0
RESAMPLES = 1000


@dataclass(frozen=True)
class Table:
    """The records of one or more runs as arrays, and their resamples.

    Attributes:
        rows: the points that every run has, the SFT model's first; each with one record per run.
        rewards: names, in the order of the columns.
        objectives: the columns that make the front.
        samples: means of the rewards, then KL and words.
        measured: for each run [points, prompts, rewards + 2], what `samples` are means of; NaN for a missing score.
        resamples: how many were drawn, with the seed `SEED`.
    """

    rows: list[list[Point]]
    rewards: list[str]
    objectives: list[int]
    samples: RunSamples
    measured: list[np.ndarray]
    resamples: int

    @property
    def means(self) -> np.ndarray:
        """Averages over runs, [1 + resamples, points, rewards + 2]; row 0 is measured."""
        return run_average(self.samples.means, self.samples.drawn)

    @property
    def scores(self) -> np.ndarray:
        """Mean scores of the objectives, [1 + resamples, runs, points, objectives]."""
        return self.samples.means[..., self.objectives]

    def fronts(self) -> dict[str, np.ndarray]:
        """Return the `scores` of each method's points."""
        scores = self.scores
        return {name: scores[:, :, rows] for name, rows in self.methods().items()}

    def references(self, declared: Mapping[str, Mapping[str, float]]) -> dict[str, np.ndarray]:
        """Return each reference point in every run and resample, [1 + resamples, runs, objectives].

        Each resample has its own "sft" (SFT's mean scores) and "worst" (the lowest mean of any point).
        Declared references are constant.
        """
        scores = self.scores
        found = {SFT: scores[:, :, 0], "worst": scores.min(axis=2)}
        for label, at in declared.items():
            place = [at[self.rewards[index]] for index in self.objectives]
            found[label] = np.broadcast_to(place, found[SFT].shape)
        return found

    def contributions(self, exactly: bool) -> tuple[np.ndarray, bool]:
        """Return what each point adds to its method's hypervolume above SFT, [points], and whether all are exact."""
        shares, exact, scores = np.zeros(len(self.rows)), True, self.scores[0]
        for rows in self.methods().values():
            found = [affordable_contributions(run[rows], run[0], exactly) for run in scores]
            shares[rows] = np.mean([values for values, _ in found], axis=0)
            exact = exact and all(precise for _, precise in found)
        return shares, exact

    def change(self, row: int, other: int) -> np.ndarray:
        """Return the means of one point minus those of another, averaged: [1 + resamples, rewards + 2]."""
        samples = self.changes(row, other)
        return run_average(samples.means, samples.drawn)[:, 0]

    def changes(self, row: int, other: int) -> RunSamples:
        """Return the means of one point minus those of another in each run, as one point; paired by prompt.

        A measure uses the prompts where both points have a score.
        """
        if not any(np.isnan(one[[row, other]]).any() for one in self.measured):
            means = self.samples.means
            return RunSamples(means[:, :, [row]] - means[:, :, [other]], self.samples.drawn)
        pairs = [one[[row]] - one[[other]] for one in self.measured]
        both = f"both {self.rows[row][0].spec} and {self.rows[other][0].spec}"
        return _resampled(pairs, self.resamples, [both], self.rewards)

    def methods(self) -> dict[str, list[int]]:
        """Return the rows of each method."""
        found: dict[str, list[int]] = {}
        for index, (point, *_) in enumerate(self.rows):
            if point.spec.method != SFT:
                found.setdefault(point.spec.method, []).append(index)
        return found


def tabulate(runs: Sequence[Run], resamples: int | None = None) -> Table:
    """Return the records of runs, which differ in the policies' training seed, as arrays.

    `resamples` are by default as many as the first run's project asks for.

    Raises:
        UserError: runs of different projects or without a common point, records with other
            prompts, scores that are not finite, or too few prompts with a score.
    """
    rewards = list(runs[0].rewards)
    rows = _common_points(runs)
    _check_points([point for row in rows for point in row], rewards)
    measures = [np.stack([_measures(row[index], rewards) for row in rows]) for index in range(len(runs))]
    objectives = [rewards.index(name) for name in runs[0].objectives]
    resamples = resamples or int(runs[0].header.get("sweep", {}).get("resamples", RESAMPLES))
    samples = _resampled(measures, resamples, [str(point.spec) for point, *_ in rows], rewards)
    return Table(rows, rewards, objectives, samples, measures, resamples)


def control_sets(run: Run) -> dict[str, int]:
    """Return the number of control texts in each set; older runs have one set without a name."""
    told = (run.header.get("control") or {}).get("texts", 0 if run.sft.control is None else len(run.sft.control))
    return dict(told) if isinstance(told, Mapping) else {CONTROL: told}


def control_perplexities(table: Table, run: Run) -> dict[str, np.ndarray]:
    """Return the perplexity of each set of control texts at each point, [1 + resamples, points].

    Without the sets of which no token is predicted at some point. `run` is the table's first.
    """
    counts = control_sets(run)
    slices = {
        name: slice(end - counts[name], end) for name, end in zip(counts, accumulate(counts.values()), strict=True)
    }
    found = {name: _perplexities(table, texts, table.means.shape[0] - 1) for name, texts in slices.items()}
    return {name: values for name, values in found.items() if values is not None}


def _perplexities(table: Table, texts: slice, resamples: int) -> np.ndarray | None:
    sums = [[_predicted(point, texts) for point in row] for row in table.rows]
    if not all(len(one) for row in sums for one in row):
        return None
    runs = [np.stack([row[index] for row in sums]) for index in range(len(sums[0]))]
    samples = resample_runs(runs, resamples, SEED)
    return np.asarray(run_average(perplexity(samples.means), samples.drawn))


def _predicted(point: Point, texts: slice) -> np.ndarray:
    """Return the sums of the control texts with at least one predicted token, [texts, 2]."""
    sums = np.zeros((0, 2)) if point.control is None else point.control[texts]
    return sums[sums[:, 1] > 0]


def perplexity(sums: np.ndarray) -> np.ndarray:
    """Return exp(Σ −log π(token) / tokens) of sums of nats and of tokens, [..., 2]."""
    return np.asarray(np.exp(sums[..., 0] / sums[..., 1]))


def _measures(point: Point, rewards: list[str]) -> np.ndarray:
    """Return each prompt's mean scores, KL and words: [prompts, rewards + 2]; NaN for no score."""
    columns = [*(point.scores[name] for name in rewards), point.kl, point.words]
    values = np.stack(columns, axis=1).astype(np.float64)
    prompts = len(np.unique(point.prompt_index))
    return prompt_means(values, prompts)


def _resampled(
    measured: Sequence[np.ndarray], resamples: int, points: Sequence[str], rewards: Sequence[str]
) -> RunSamples:
    """Return the resampled means of [points, prompts, measures]; a UserError if too few prompts have a score.

    At least half of the resamples must draw a score for every mean.
    """
    samples = resample_runs(measured, resamples, SEED)
    counts = np.min([(~np.isnan(one)).sum(axis=1) for one in measured], axis=0)
    if 2 * (len(samples.means) - 1) < resamples or np.isnan(samples.means[0]).any():
        point, reward = np.unravel_index(counts.argmin(), counts.shape)
        raise fail(
            "too few prompts have a score for an interval",
            where=f"{points[point]}, reward `{rewards[reward]}`",
            expected="so many that half of the resamples draw a score for every mean",
            got=f"{counts[point, reward]} of {measured[0].shape[1]} prompts",
            remedy="score more prompts, or begin a new run without the reward: `--out FOLDER`",
        )
    return samples


def _common_points(runs: Sequence[Run]) -> list[list[Point]]:
    """Return the points of every run: the SFT model's, then each method's in the order of λ."""
    _check_runs(runs)
    found: list[dict[Hashable, Point]] = []
    for run in runs:
        points = [run.sft, *(point for method in run.methods().values() for point in method)]
        # Not the whole spec: a matched or tuned schedule may differ between runs.
        found.append({(one.spec.method, one.spec.weights, one.spec.checkpoint): one for one in points})
    shared = [place for place in found[0] if all(place in points for points in found)]
    if len(shared) < 2:
        raise fail("the runs have no point in common", where=_folders(runs), expected="the same methods and λ")
    rows = [[points[place] for points in found] for place in shared]
    for name, kinds in {row[0].spec.method: {_kind(point.spec) for point in row} for row in rows}.items():
        if len(kinds) > 1:
            expected = "one merge method, one form of schedule, one factor for each kind of module"
            remedy = "give one of the methods another name in its project"
            what, where = f"the runs have different methods `{name}`", _folders(runs)
            raise fail(what, where=where, expected=expected, remedy=remedy)
    return rows


def _kind(spec: PointSpec) -> Hashable:
    """Return what points must share, so that a mean of their schedules says what they are."""
    merge = spec.merge
    return merge.method, merge.modules, *(len(merge.schedule.line(at).blocks) for at in range(len(spec.weights)))


def _check_runs(runs: Sequence[Run]) -> None:
    """Refuse a run named twice, and runs that cannot be averaged."""
    if len({run.folder.resolve() for run in runs}) < len(runs):
        raise fail("a run is named twice", where=_folders(runs), expected="runs of different training seeds")
    first, *others = (_facts(run) for run in runs)
    for run, facts in zip(runs[1:], others, strict=True):
        for what, expected in first.items():
            if facts[what] != expected:
                raise fail(
                    f"the runs have different {what}",
                    where=_folders([runs[0], run]),
                    expected="runs of one project, whose policies are of other training seeds",
                    got="" if what == "prompts" else "; ".join(map(", ".join, (expected, facts[what]))),
                )


def _facts(run: Run) -> dict[str, list[str]]:
    """Return what averaged runs must have in common."""
    roles = {name: "" if name in run.objectives else " (audit)" for name in run.rewards}
    return {
        "rewards": [f"{name}{f' [{unit}]' if unit else ''}{roles[name]}" for name, unit in run.rewards.items()],
        "policies": list(run.header.get("policies", {})),
        "mixtures": [f"{name}: {preference_text(one)}" for name, one in run.header.get("mixtures", {}).items()],
        "prompts": run.sft.prompts,
        "control texts": [f"{count} {name}" for name, count in control_sets(run).items()],
    }


def _folders(runs: Sequence[Run]) -> str:
    return " and ".join(str(run.folder) for run in runs)


def _check_points(points: Sequence[Point], rewards: list[str]) -> None:
    """Refuse records that cannot be compared, all together."""
    remedy = "delete its file in points/ and run the sweep again"
    problems = []
    for point in points:
        faults = _faults(point, points[0].prompts, rewards)
        problems += [Problem(fault, where=str(point.spec), remedy=remedy) for fault in faults]
        scores = {name: values for name, values in point.scores.items() if name in rewards}
        problems += too_few(str(point.spec), scores, len(np.unique(point.prompt_index)), point.missing)
    if problems:
        raise UserError(problems)


def _faults(point: Point, prompts: list[str], rewards: list[str]) -> list[str]:
    """Return why a point cannot be compared; empty for a whole record of these prompts."""
    faults = [] if point.prompts == prompts else ["has other prompts than the SFT model"]
    if missing := [name for name in rewards if name not in point.scores]:
        return [*faults, f"has no score for {', '.join(missing)}"]
    wrongs = {name: np.isinf(point.scores[name]) for name in rewards} | {"KL": ~np.isfinite(point.kl)}
    for name, values in wrongs.items():
        if wrong := int(values.sum()):
            faults.append(f"{name} is not finite for {wrong} of {len(values)} responses")
    texts = np.zeros((0, 2)) if point.control is None else point.control
    # NaN would count as a text that is not there.
    if wrong := int((~np.isfinite(texts)).any(axis=1).sum()):
        faults.append(f"the likelihood of {wrong} of {len(texts)} control texts is not finite")
    return faults

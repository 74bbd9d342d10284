"""`search --shape`: the shape over depth with the largest hypervolume on validation prompts, measured on test."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import blake3
import numpy as np
import yaml

from rewarded_lines.config import SFT, TUNED, TuneSpec
from rewarded_lines.data.rows import Row, rows_hash
from rewarded_lines.errors import fail
from rewarded_lines.evaluator.depth_shapes import ShapeSpace, shaped_merge
from rewarded_lines.evaluator.paired_scores import tabulate
from rewarded_lines.evaluator.points import PointSpec
from rewarded_lines.evaluator.records import Point, Run, read_header
from rewarded_lines.evaluator.run_folder import SHAPES, RunFolder, open_run
from rewarded_lines.evaluator.shape_options import ShapeOptions
from rewarded_lines.evaluator.sweep_setup import Setup
from rewarded_lines.evaluator.tune import validation_rows, worth
from rewarded_lines.folders import json_object_in, write_json
from rewarded_lines.merger.lines_schedule import Line
from rewarded_lines.merger.spec import MergeSpec
from rewarded_lines.pareto.comparison import MethodVolume, VolumeDifference, compare, method_volumes, sample_volumes
from rewarded_lines.progress import SILENT, Progress
from rewarded_lines.rewards.reward import deciding
from rewarded_lines.versions import noted, pip

SHAPE, UNIFORM = "shape", "shape-uniform"
_OTHERS = {"soup": Line(1.0, 0.0), "lines": Line(1.0, 1.0)}
# Where a search starts, and the number of trials that are random if there are fewer.
_KNOWN, _RANDOM = (*_OTHERS.values(), Line(2.0, -1.0)), 8
_MOST_NUMBERS, _STEP = 12, 0.01
# Settings that decide the trials, apart from their number.
_DECIDING = ("trial_points", "screen", "max_kl", "low_kl", "sampler", "seed")


@dataclass(frozen=True)
class Trial:
    """One shape that was tried on validation prompts.

    Attributes:
        numbers: its scales at the knots.
        screened: hypervolume above SFT on the first prompts.
        hypervolume: on all of them; None where the first did not promise enough.
        kl: the largest mean KL of its points, in nats.
        told: what the sampler was told: the hypervolume, a guess of it, or less than 0 above the ceiling of the KL.
    """

    numbers: list[float]
    screened: float
    hypervolume: float | None
    kl: float
    told: float


@dataclass(frozen=True)
class FoundShape:
    """The best shape, and what it is worth on the test prompts beside other schedules.

    Attributes:
        scales: of every block, first to last, by policy; only "all" if policies share them.
        tuned: the best α and β of as many trials.
        trials: of the shape, and how many of them saw all validation prompts.
        volumes: of each schedule above SFT, on the test prompts.
        differences: that of the shape minus that of each other schedule, resampled together.
        kl: the largest mean KL of each schedule's points, in nats.
        verdict: in words, whether the shape is better than a constant scale with its norm, and than the tuned α and β.
        rows: YAML for `sweep.methods:` of the project.
        file: all trials.
    """

    scales: dict[str, list[float]]
    tuned: tuple[float, float]
    trials: tuple[int, int]
    volumes: list[MethodVolume]
    differences: list[VolumeDifference]
    kl: dict[str, float]
    verdict: str
    rows: str
    file: str


def plan_shape(setup: Setup, options: ShapeOptions) -> tuple[ShapeSpace, list[Row]]:
    """Return the shapes to choose from, and rows of validation prompts, none of them a test prompt.

    Raises:
        UserError: optuna or BoTorch is missing, shapes do not fit policies and blocks, or there are no such prompts.
    """
    policies, stacks = len(setup.project.config.policies), setup.plan.depths.stacks
    curves, blocks = policies if options.each_policy else 1, max(stacks.values())
    if policies < 2 or blocks < 2 or min(stacks.values()) < blocks:
        got = f"{policies} policies, lists of {', '.join(map(str, stacks.values()))} blocks"
        expected = "two policies, one number of blocks above 1"
        raise fail("no shape to search", where="--shape", expected=expected, got=got)
    if options.knots * curves > _MOST_NUMBERS or options.knots > blocks:
        expected = f"at most {_MOST_NUMBERS} numbers, and no more knots than blocks"
        got = f"{options.knots} knots for each of {curves} shapes over {blocks} blocks"
        fits, shared = (min(blocks, _MOST_NUMBERS // count) for count in (curves, 1))
        other = "leave --each-policy out" + (f" and pass --knots {shared}" if options.knots > shared else "")
        remedies = [f"pass --knots {fits}"] * (fits >= 2) + [other] * (curves > 1)
        remedy = ", or ".join(remedies)
        raise fail("too many numbers to search", where="--knots", expected=expected, got=got, remedy=remedy)
    spec, prompts = setup.project.config.sweep.tune, setup.project.config.prompts
    if options.validation is not None and prompts is not None:
        file = {"file": str(Path(options.validation).absolute()), "dataset": None, "limit": None}
        spec = TuneSpec(trials=1, prompts=prompts.model_copy(update=file))
    if spec is None:
        remedy = "name a file with --validation, or write `tune:` under `sweep:` in the project"
        raise fail("no validation prompts", where="--shape", expected="prompts to choose a shape on", remedy=remedy)
    rows = validation_rows(setup, spec.model_copy(update={"points": options.trial_points}))
    rows = [row for row in rows if row["prompt"] not in setup.prompts][: options.prompts]
    try:
        _sampler(options, 0)
    except ImportError as error:
        remedy = noted(pip('install "optuna-integration[botorch]"'), "or leave --sampler out")
        raise fail(f"not installed: {error}", where=f"--sampler {options.sampler}", remedy=remedy) from error
    return ShapeSpace(str(options.shape), options.knots, curves, round(options.most, 2)), rows


def find_shape(
    folder: Path, setup: Setup, options: ShapeOptions, progress: Progress = SILENT
) -> tuple[Run, FoundShape]:
    """Search α and β, then a shape with as many trials; measure both on the test prompts beside other schedules.

    A trial is a front of λ with one schedule, on validation prompts. Trials are kept in the run folder, and a killed
    search continues: a proposal depends on the seed and the trials before it alone.

    Returns:
        The compared points on the test prompts, and what was found.
    """
    space, rows = plan_shape(setup, options)
    count = setup.project.config.sweep.points or setup.methods.design.usual
    each, tested = (len(setup.methods.design.weights(points)) for points in (options.trial_points, count))
    with open_run(folder, setup, progress=progress, also=[row["prompt"] for row in rows]) as run:
        run.expect(2 * (2 * options.trials * each + 1) + 5 * tested + 1)
        lines = Search(run, options, ShapeSpace("linear", 2, 1, space.most), rows)
        first, last = lines.best(_KNOWN).numbers
        tuned = Line(round(first, 2), round(last - first, 2))
        search = Search(run, options, space, rows)
        scales = space.scales(search.best((tuned, *_KNOWN)).numbers, search.blocks)
        compared = _compared(run, scales, tuned, count)
    found = _found(compared, search, scales, tuned)
    search.write(found=asdict(found))
    return compared, found


class Search:
    """The search of one space of shapes on validation prompts; `file` keeps its `trials`."""

    def __init__(self, run: RunFolder, options: ShapeOptions, space: ShapeSpace, rows: list[Row]) -> None:
        """Read the trials of an earlier search with these settings."""
        self._run, self.options, self._space = run, options, space
        self.blocks = max(run.setup.plan.depths.stacks.values())
        first = options.screen or len(rows)
        self._parts = [run.setup.on(part) for part in (rows[:first], rows[first:]) if part]
        self._settings = {**asdict(space), **{name: getattr(options, name) for name in _DECIDING}}
        self._settings["prompts"] = rows_hash(deciding(rows, run.setup.rewards.values()))
        name = blake3.blake3(json.dumps(self._settings, sort_keys=True).encode()).hexdigest(length=4)
        self.file = run.folder / SHAPES / f"{space.kind}-{space.knots * space.curves}-{name}.json"
        self.trials = [Trial(**one) for one in json_object_in(self.file).get("trials", [])]

    def best(self, known: Sequence[Line]) -> Trial:
        """Make the missing trials, the first of them with `known` schedules, and return the best.

        Raises:
            UserError: none is below the ceiling of the KL.
        """
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        names = [f"scale {number}" for number in range(self._space.knots * self._space.curves)]
        study = optuna.create_study(directions=["maximize", "minimize"][: 1 + self.options.low_kl])
        starts = list(dict.fromkeys(tuple(self._space.straight(one.alpha, one.beta)) for one in known))
        for number in range(self.options.trials):
            # A new sampler for each trial: where a search was killed decides nothing.
            study.sampler = _sampler(self.options, number)
            for given in [*(one.numbers for one in self.trials), *starts[len(self.trials) :]][number : number + 1]:
                study.enqueue_trial(dict(zip(names, given, strict=True)))
            asked = study.ask()
            numbers = [asked.suggest_float(name, 0.0, self._space.most, step=_STEP) for name in names]
            if number == len(self.trials):
                self.trials.append(self._tried(numbers))
                self.write()
            told = self.trials[number].told, self.trials[number].kl
            study.tell(asked, told[: 1 + self.options.low_kl])
        done = self.trials[: self.options.trials]
        if not (whole := [one for one in done if one.hypervolume is not None and self._allowed(one.kl)]):
            got = f"{min(one.kl for one in done):.3g} or more in {len(done)} trials"
            remedy = "raise it, lower --most, or allow more --trials; those made are kept"
            raise fail("no schedule is below the ceiling", where="--max-kl", got=got, remedy=remedy)
        return max(whole, key=lambda one: float(one.hypervolume or 0))

    def write(self, **found: Any) -> None:
        """Write the trials, and at the end what was found."""
        write_json(self.file, {**self._settings, "trials": [asdict(one) for one in self.trials], **found})

    def _allowed(self, kl: float) -> bool:
        return self.options.max_kl is None or kl <= self.options.max_kl

    def _tried(self, numbers: list[float]) -> Trial:
        """Return a trial on the first prompts, and on all unless most allowed trials before were better."""
        scales, methods = self._space.scales(numbers, self.blocks), self._run.setup.methods
        merges = [shaped_merge(weights, scales) for weights in methods.weights(self.options.trial_points)]
        screened, kl = self._worth(self._parts[:1], merges)
        whole = screened if len(self._parts) == 1 else None
        earlier = [one.screened for one in self.trials if self._allowed(one.kl)] or [screened]
        if whole is None and self._allowed(kl) and screened >= np.median(earlier):
            whole, kl = self._worth(self._parts, merges)
        gains = [one.hypervolume - one.screened for one in self.trials if one.hypervolume is not None]
        told = screened + float(np.mean(gains or [0.0])) if whole is None else whole
        return Trial(numbers, screened, whole, kl, told if self._allowed(kl) else -kl / (self.options.max_kl or 1))

    def _worth(self, parts: Sequence[Setup], merges: Sequence[MergeSpec]) -> tuple[float, float]:
        """Return a front's hypervolume above SFT on these prompts, and the largest mean KL of its points."""
        specs = [PointSpec(SFT), *(PointSpec(SHAPE, merge) for merge in merges)]
        found = [self._run.fill(part, specs) for part in parts]
        sft, *front = (_joined(points) for points in zip(*found, strict=True))
        rewards = self._run.setup.objectives
        return worth([one.means(rewards) for one in front], sft, rewards), max(float(one.kl.mean()) for one in front)


def _joined(parts: Sequence[Point]) -> Point:
    """Return a point's records on different prompts as one."""
    starts = np.cumsum([0, *(part.prompt_index[-1] + 1 for part in parts)])
    index = np.concatenate([part.prompt_index + start for part, start in zip(parts, starts, strict=False)])
    scores = {name: np.concatenate([part.scores[name] for part in parts]) for name in parts[0].scores}
    return replace(parts[0], prompt_index=index, scores=scores, kl=np.concatenate([part.kl for part in parts]))


def _sampler(options: ShapeOptions, number: int) -> Any:
    import optuna

    seed = 1_000_003 * options.seed + number
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if options.sampler == "tpe":
            return optuna.samplers.TPESampler(n_startup_trials=_RANDOM, multivariate=True, seed=seed)
        return import_module("optuna_integration").BoTorchSampler(n_startup_trials=_RANDOM, seed=seed)


def _compared(run: RunFolder, scales: list[list[float]], tuned: Line, count: int) -> Run:
    """Return all schedules on the test prompts, each at the λ of a sweep with `count`."""
    setup, specs = run.setup, [PointSpec(SFT)]
    for weights in setup.methods.weights(count):
        lines = {**_OTHERS, TUNED: tuned}.items()
        specs += [PointSpec(name, MergeSpec(weights, line.alpha, line.beta)) for name, line in lines]
        shape = shaped_merge(weights, scales)
        flat = MergeSpec(weights, setup.plan.matched_alpha(weights, shape), 0.0)
        specs += [PointSpec(UNIFORM, flat), PointSpec(SHAPE, shape)]
    return Run(run.folder, read_header(run.folder), run.fill(setup, specs))


def _found(run: Run, search: Search, scales: list[list[float]], tuned: Line) -> FoundShape:
    table = tabulate([run])
    volumes = sample_volumes(table.fronts(), {SFT: table.scores[:, :, 0]}, table.samples.drawn)
    differences = [one for one in compare(volumes) if one.method == SHAPE]
    kl = {name: max(float(one.kl.mean()) for one in points) for name, points in run.methods().items()}
    named = dict(zip(run.header["policies"] if len(scales) > 1 else ["all"], scales, strict=True))
    schedule = {SHAPE: {"schedule": named if len(scales) > 1 else scales[0]}, UNIFORM: {"match": SHAPE}}
    tried = search.trials[: search.options.trials]
    rows = {**schedule, f"{SHAPE}-tuned": {"alpha": tuned.alpha, "beta": tuned.beta}}
    return FoundShape(
        scales=named,
        tuned=(tuned.alpha, tuned.beta),
        trials=(len(tried), sum(one.hypervolume is not None for one in tried)),
        volumes=method_volumes(volumes),
        differences=differences,
        kl=kl,
        verdict=_verdict(differences, kl),
        rows=yaml.safe_dump(rows, sort_keys=False, default_flow_style=None, width=10_000),
        file=str(search.file),
    )


def _verdict(differences: Sequence[VolumeDifference], kl: Mapping[str, float]) -> str:
    """Return a sentence for each of the two controls that tell whether depth matters, and its shape."""
    others = {UNIFORM: "a constant scale with its norm", TUNED: "the best α and β of as many trials"}
    changes, sentences = {one.other: one.difference for one in differences}, []
    for other, words in others.items():
        change = changes[other]
        how = "better" if change.low > 0 else "worse" if change.high < 0 else "not shown to be better"
        why = "" if change.low > 0 or change.high < 0 else "; the interval includes 0"
        shown = f"{change.value:+.3g} [{change.low:.3g}, {change.high:.3g}] hypervolume{why}"
        nats = f"largest KL {kl[SHAPE]:.3g} against {kl[other]:.3g} nats"
        sentences.append(f"The shape is {how} than {words}: {shown} ({nats}).")
    return "\n".join(sentences)

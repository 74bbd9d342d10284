"""The search for α and β: trials by optuna, judged by their hypervolume on validation prompts only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import numpy as np

from rewarded_lines.config import SFT, TUNED, TuneSpec
from rewarded_lines.data.forms import read_prompts
from rewarded_lines.data.prompts import Prompt
from rewarded_lines.data.rows import rows_hash
from rewarded_lines.errors import fail
from rewarded_lines.evaluation.evaluate import Evaluator
from rewarded_lines.evaluation.points import PointSpec, check_merge
from rewarded_lines.evaluation.records import Point
from rewarded_lines.evaluation.run_folder import RunFolder
from rewarded_lines.evaluation.sweep_setup import Setup, readable_prompts
from rewarded_lines.fronts.hypervolume import hypervolume
from rewarded_lines.rules.methods import METHODS
from rewarded_lines.rules.preferences import simplex_grid
from rewarded_lines.rules.spec import MergeSpec

# α and β to the hundredth: finer differences are below what a few hundred prompts can tell apart.
_STEP = 0.01
# Where the search starts: Rewarded Soups, LiNeS, and LiNeS for a single task.
_KNOWN = ((1.0, 0.0), (1.0, 1.0), (0.5, 0.5))


@dataclass(frozen=True)
class Tuned:
    """What the search found.

    Attributes:
        alpha: α of the best trial.
        beta: its β.
        hypervolume: its hypervolume on the validation prompts, above the SFT model's scores there.
        trials: alpha, beta and hypervolume of every trial, in order.
        points: the best trial's points over the sweep's grid, to be evaluated on the test prompts.
        prompts: count and hash of the validation prompts, and how many of them are test prompts too.
    """

    alpha: float
    beta: float
    hypervolume: float
    trials: list[dict[str, float]]
    points: list[PointSpec]
    prompts: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return what `run.json` says of the search."""
        names = ("alpha", "beta", "hypervolume", "prompts", "trials")
        return {name: getattr(self, name) for name in names}


def validation_prompts(setup: Setup) -> list[Prompt]:
    """Return the prompts that α and β are chosen on; none where nothing is tuned.

    Raises:
        UserError: optuna is missing, the merge method does not fit, or the prompts are those of the test.
    """
    spec = setup.project.config.sweep.tune
    if spec is None:
        return []
    where = setup.project.where("sweep", "tune")
    if find_spec("optuna") is None:
        raise fail("optuna is not installed", where=where, remedy="pip install 'rewarded-lines[tune]'")
    check_merge(where, spec.merge, spec.options, len(setup.project.config.policies))
    if METHODS[spec.merge].weights == "none":
        raise fail(f"{spec.merge} has no λ", where=where, remedy="name a merge method with weights")
    prompts = read_prompts(spec.prompts, setup.project.root)
    prompts = readable_prompts(spec.prompts, prompts, setup.project, setup.plan, setup.rewards, setup.told.append)
    if all(prompt in setup.prompts for prompt in prompts):
        raise fail(
            "the validation prompts are test prompts",
            where=f"{where}.prompts",
            expected="prompts that `prompts:` does not hold",
            got=f"{len(prompts)}, all of them among the test prompts",
            remedy="name another file or split",
        )
    return prompts


def trial_points(setup: Setup, count: int) -> int:
    """Return how many points a search of `tune` makes at most, those of its best trial on the test prompts included.

    Args:
        setup: the project.
        count: see `tune`.
    """
    spec = setup.project.config.sweep.tune
    if spec is None:
        return 0
    policies = len(setup.project.config.policies)
    return 1 + spec.trials * len(simplex_grid(policies, spec.points or count)) + len(simplex_grid(policies, count))


def tune(run: RunFolder, make: Evaluator, prompts: list[Prompt], count: int) -> Tuned | None:
    """Search α and β for the largest hypervolume on validation prompts.

    Every trial's points are kept like any other, so a search that was killed goes on where it stopped: the same seed
    proposes the same trials.

    Args:
        run: the run folder.
        make: makes points.
        prompts: see `validation_prompts`.
        count: λ on each edge of the simplex, of the points that are returned.
    """
    spec = run.setup.project.config.sweep.tune
    if spec is None:
        return None
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    setup = run.setup.on(prompts)
    grid = spec.points or count
    (sft,) = run.fill(setup, [PointSpec(SFT)], make)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=spec.seed))
    for alpha, beta in _KNOWN:
        if spec.alpha[0] <= alpha <= spec.alpha[1] and spec.beta[0] <= beta <= spec.beta[1]:
            study.enqueue_trial({"alpha": alpha, "beta": beta})

    # Not `study.optimize`, which prints a traceback of its own for what is told to the user in one message.
    for _ in range(spec.trials):
        trial = study.ask()
        alpha, beta = (_suggest(trial, name, getattr(spec, name)) for name in ("alpha", "beta"))
        front = run.fill(setup, _points(run.setup, spec, alpha, beta, grid), make)
        study.tell(trial, _hypervolume(run.setup, front, sft))
    best = study.best_trial
    alpha, beta = (_rounded(best.params[name]) for name in ("alpha", "beta"))
    trials = [
        {**{name: _rounded(value) for name, value in one.params.items()}, "hypervolume": one.value or 0.0}
        for one in study.trials
    ]
    told = {
        "count": len(prompts),
        "hash": rows_hash({"prompt": prompt} for prompt in prompts),
        "in_test": sum(prompt in run.setup.prompts for prompt in prompts),
    }
    points = _points(run.setup, spec, alpha, beta, count)
    return Tuned(alpha, beta, float(best.value or 0.0), trials, points, told)


def _points(setup: Setup, spec: TuneSpec, alpha: float, beta: float, count: int) -> list[PointSpec]:
    policies = len(setup.project.config.policies)
    merges = (MergeSpec(weights, alpha, beta, spec.merge, spec.options) for weights in simplex_grid(policies, count))
    return [PointSpec(TUNED, merge.complete(policies)) for merge in merges]


def _hypervolume(setup: Setup, points: Sequence[Point], sft: Point) -> float:
    def means(point: Point) -> list[float]:
        return [float(np.mean(point.scores[name])) for name in setup.objectives]

    return hypervolume([means(point) for point in points], means(sft))


def _suggest(trial: Any, name: str, bounds: tuple[float, float]) -> float:
    low, high = bounds
    return _rounded(
        trial.suggest_float(name, low, high, step=_STEP) if low < high else trial.suggest_float(name, low, high)
    )


def _rounded(value: float) -> float:
    return round(float(value), 6)

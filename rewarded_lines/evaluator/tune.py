"""The search for α and β: optuna's trials, scored by their hypervolume on validation prompts only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rewarded_lines.config import SFT, TUNED, TuneSpec
from rewarded_lines.data.dataset_formats import read_prompts
from rewarded_lines.data.rows import Row, rows_hash
from rewarded_lines.errors import fail
from rewarded_lines.evaluator.points import PointSpec
from rewarded_lines.evaluator.project_methods import check_merge
from rewarded_lines.evaluator.records import Point
from rewarded_lines.evaluator.run_folder import RunFolder
from rewarded_lines.evaluator.sweep_setup import Setup
from rewarded_lines.extras import require
from rewarded_lines.merger.methods import METHODS
from rewarded_lines.merger.spec import MergeSpec
from rewarded_lines.pareto.approximate_hypervolume import careful
from rewarded_lines.rewards.reward import deciding

# A few hundred prompts cannot tell finer differences in α and β apart.
_STEP = 0.01
# Up to so many rewards a hypervolume of 0 stays 0, as in the trials of earlier runs.
_FEW = 3
# Where the search starts: Rewarded Soups, LiNeS, and LiNeS for a single task.
_KNOWN = ((1.0, 0.0), (1.0, 1.0), (0.5, 0.5))


def validation_rows(setup: Setup, spec: TuneSpec) -> list[Row]:
    """Return the rows with the prompts that α and β are chosen on.

    Raises:
        UserError: optuna is missing, the merge method does not fit, or all are test prompts.
    """
    where = setup.project.where("sweep", "tune")
    require("tune", where)
    check_merge(where, spec.merge, spec.options, len(setup.project.config.policies))
    if METHODS[spec.merge].weights == "none":
        raise fail(f"{spec.merge} has no λ", where=where, remedy="name a merge method with weights")
    if spec.points is not None:
        setup.methods.design.check(spec.points, f"{where}.points")
    rows = setup.readable(spec.prompts, read_prompts(spec.prompts, setup.project.root))
    if all(row["prompt"] in setup.prompts for row in rows):
        raise fail(
            "the validation prompts are test prompts",
            where=f"{where}.prompts",
            expected="prompts that are not in `prompts:`",
            got=f"{len(rows)}, all of them test prompts",
            remedy="name another file or split",
        )
    return rows


def most_points(setup: Setup, spec: TuneSpec, count: int) -> int:
    """Return the most points that `tune` makes, with its best trial on the test prompts."""
    trial, best = (len(setup.methods.design.weights(points)) for points in (spec.points or count, count))
    return 1 + spec.trials * trial + best


def tune(run: RunFolder, spec: TuneSpec, rows: list[Row], count: int) -> tuple[dict[str, Any], list[PointSpec]]:
    """Search α and β for the largest hypervolume on validation prompts.

    With many rewards no point may be above SFT on all of them, see `worth`.

    Every trial's points are kept like any other. A killed search continues where it stopped,
    because the same seed proposes the same trials.

    Returns:
        The search's part of `run.json`: α, β and hypervolume above the SFT model's scores of the
        best trial and of all trials in order; and the best trial's points for the test prompts,
        at the design's λ for `count`.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    setup = run.setup.on(rows)
    (sft,) = run.fill(setup, [PointSpec(SFT)])
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=spec.seed))
    for alpha, beta in _KNOWN:
        if spec.alpha[0] <= alpha <= spec.alpha[1] and spec.beta[0] <= beta <= spec.beta[1]:
            study.enqueue_trial({"alpha": alpha, "beta": beta})

    # Not `study.optimize`, which prints a traceback beside the error message.
    for _ in range(spec.trials):
        trial = study.ask()
        alpha, beta = (_suggest(trial, name, getattr(spec, name)) for name in ("alpha", "beta"))
        front = run.fill(setup, _points(run.setup, spec, alpha, beta, spec.points or count))
        means = [point.means(setup.objectives) for point in front]
        study.tell(trial, worth(means, sft, setup.objectives))
    best = study.best_trial
    alpha, beta = (_rounded(best.params[name]) for name in ("alpha", "beta"))
    found = {
        "alpha": alpha,
        "beta": beta,
        **_measured(best.value),
        "prompts": {
            "count": len(rows),
            "hash": rows_hash(deciding(rows, setup.rewards.values())),
            "in_test": sum(row["prompt"] in run.setup.prompts for row in rows),
        },
        "trials": [
            {**{name: _rounded(value) for name, value in one.params.items()}, **_measured(one.value)}
            for one in study.trials
        ],
    }
    return found, _points(run.setup, spec, alpha, beta, count)


def worth(means: Sequence[Sequence[float]], sft: Point, rewards: Sequence[str]) -> float:
    """Return a front's hypervolume above SFT.

    With many rewards there may be no point above SFT on each. Then it is how far the nearest is below,
    −min_p max_i (c_i − s_p,i)/d_i, with mean c and standard deviation d of SFT's scores.
    """
    volume = careful(means, sft.means(rewards))[0]
    if volume or len(rewards) <= _FEW:
        return volume
    spread = np.array([np.nanstd(sft.scores[name]) for name in rewards])
    short = (np.array(sft.means(rewards)) - np.array(means)) / np.where(spread > 0, spread, 1.0)
    return -float(short.max(axis=1).min())


def _measured(worth: float | None) -> dict[str, float]:
    """Return a trial's part of `run.json`; `shortfall` only where there is one."""
    value = float(worth or 0.0)
    return {"hypervolume": value} if value >= 0 else {"hypervolume": 0.0, "shortfall": -value}


def _points(setup: Setup, spec: TuneSpec, alpha: float, beta: float, count: int) -> list[PointSpec]:
    policies, places = len(setup.project.config.policies), setup.methods.weights(count)
    merges = (MergeSpec(weights, alpha, beta, spec.merge, spec.options) for weights in places)
    return [PointSpec(TUNED, merge.complete(policies)) for merge in merges]


def _suggest(trial: Any, name: str, bounds: tuple[float, float]) -> float:
    low, high = bounds
    return _rounded(trial.suggest_float(name, low, high, step=_STEP if low < high else None))


def _rounded(value: float) -> float:
    return round(float(value), 6)

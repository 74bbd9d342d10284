"""The verbs `sweep`, which measures every λ of every method beside SFT, and `score`, which measures one model."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rewarded_lines.config import POLICIES, TuneSpec
from rewarded_lines.errors import fail
from rewarded_lines.evaluator.points import PointSpec
from rewarded_lines.evaluator.records import Run
from rewarded_lines.evaluator.run_folder import RunFolder, open_run, stored_run
from rewarded_lines.evaluator.sweep_options import SweepOptions, takes_sweep_options
from rewarded_lines.evaluator.sweep_setup import Setup, open_setup
from rewarded_lines.evaluator.tune import most_points, tune, validation_rows
from rewarded_lines.evaluator.weight_designs import SPREAD, Design
from rewarded_lines.progress import SILENT, Progress
from rewarded_lines.projects import Project, load_project
from rewarded_lines.references import looks_local
from rewarded_lines.trace import traced


@takes_sweep_options()
@traced
def sweep(
    config: Path | str | Project = "rewarded-lines.yaml",
    *,
    points: int | None = None,
    out: Path | str | None = None,
    options: SweepOptions,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> Run:
    """Evaluate every method of a project along λ, and its SFT model, on the same prompts and seeds.

    Merged weights stream from the policies into the running engine, and merged adapters share its
    batches; no merged checkpoint is kept. Each point is one Parquet file, named by the hash of all
    that determines it, and is made only if that file is missing or damaged. With `sweep.tune` α and
    β are searched first, on validation prompts only.

    Args:
        config: the project file, or a loaded project.
        points: λ on each edge of the simplex, or in all with `design: spread`, which is the default from four
            policies on; by default the project's `sweep.points`.
        out: the run folder; by default `sweep` beside the project file.
        options: each of `SweepOptions` is also a keyword of this function, such as `engine`.
        overwrite: begin anew if the folder holds the run of another configuration.
        progress: receives the steps and the finished points.

    Raises:
        UserError: a fault of project, checkpoints, rewards or prompts, before anything is
            generated; or a reward that fails on a response.
    """
    project = config if isinstance(config, Project) else load_project(config)
    count = _count(project, points)
    setup = open_setup(project, options, progress)
    spec = project.config.sweep.tune
    validation = validation_rows(setup, spec) if spec else []
    folder = Path(out) if out is not None else project.root / "sweep"
    progress.start("laying out the points")
    specs = setup.methods.points(count)
    with open_run(folder, setup, overwrite, progress, [row["prompt"] for row in validation]) as run:
        check_design(run)
        for fact in _plan(setup, specs, spec, count):
            progress.tell(fact)
        added = [one for one in run.added if one.method in setup.methods.specs]
        run.expect(len({*specs, *added}) + (most_points(setup, spec, count) if spec else 0))
        run.write([*specs, *added], added)
        found, tuned = tune(run, spec, validation, count) if spec else (None, [])
        run.finish([*specs, *tuned, *added], added, found)
    return stored_run(folder)


@takes_sweep_options(without=("ray", "workers"))
@traced
def score(
    model: Path | str,
    config: Path | str | Project = "rewarded-lines.yaml",
    *,
    out: Path | str | None = None,
    options: SweepOptions,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> Run:
    """Evaluate one model as a sweep does: a merged or trained policy, or a LoRA adapter over the base.

    Args:
        model: its folder, from the working directory, or a Hub id.
        config: the project file, or a loaded project: base, rewards, prompts, generation.
        out: a run folder that keeps the records for `report`; by default nothing is kept.
        options: all of `sweep` but `ray` and `workers`; for `overwrite` and `progress` see `sweep`, too.

    Returns:
        A run of two points: the SFT model, and the model as the one policy.

    Raises:
        UserError: as for `sweep`.
    """
    project = config if isinstance(config, Project) else load_project(config)
    reference = str(model)
    if looks_local(reference) or Path(reference).exists():
        if not Path(reference).is_dir():
            raise fail("no such model", where=reference, expected="a model's folder, an adapter's, or a Hub id")
        reference = str(Path(reference).resolve())
    name = Path(reference).name
    settings = project.config.sweep.model_copy(update={"methods": {POLICIES: None}, "tune": None, "design": None})
    alone = project.config.model_copy(
        update={"policies": {name: reference}, "mixtures": {}, "baselines": {}, "sweep": settings}
    )
    project = replace(project, config=alone)
    with tempfile.TemporaryDirectory() as scratch:
        done = sweep(project, out=out or scratch, options=options, overwrite=overwrite, progress=progress)
        # Both points, before their files go.
        return replace(done, points=list(done.points))


def _count(project: Project, points: int | None) -> int:
    """Return how many λ the design is asked for; too few are refused before anything is opened."""
    sweep = project.config.sweep
    policies, asked = len(project.config.policies), sweep.points if points is None else points
    design = Design.of(sweep.design, policies, project.where("sweep", "design"))
    if asked is None:
        return design.usual
    design.check(asked, "--points" if points is not None else project.where("sweep", "points"))
    return asked


def check_design(run: RunFolder) -> None:
    """Refuse a lattice of an earlier version in a project that now means a spread without saying so."""
    sweep = run.setup.project.config.sweep
    if sweep.design is None and run.setup.methods.design.kind == SPREAD and "sweep" in run.before:
        if "design" not in run.before["sweep"]:
            raise fail(
                "the run is a lattice, and from four policies on the default is now a spread",
                where=str(run.folder),
                expected="the project's word on it",
                remedy=f"write `design: lattice` under `sweep:` in {run.setup.project.path} to go on with it, or "
                "`design: spread`",
            )


def _plan(setup: Setup, specs: Sequence[PointSpec], tune_spec: TuneSpec | None, count: int) -> list[str]:
    """Return how many models the sweep evaluates, and what preferences do to λ, in words."""
    merged = {name: len([spec for spec in specs if spec.method == name]) for name in setup.methods.specs}
    each = ", ".join(f"{number:,} of {name}" for name, number in merged.items())
    more = f", and at most {most_points(setup, tune_spec, count):,} of tune" if tune_spec else ""
    mixtures = setup.methods.mixtures
    notes = mixtures.notes(setup.methods.weights(count)) if mixtures else []
    return [f"{len(setup.prompts):,} prompts for each of {len(specs):,} points: 1 of sft, {each}{more}", *notes]

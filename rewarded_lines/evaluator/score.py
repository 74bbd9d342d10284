"""The verb `score`: one model's responses and scores, beside the SFT model's on the same prompts."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from rewarded_lines.config import POLICIES
from rewarded_lines.errors import fail
from rewarded_lines.evaluator.records import Run
from rewarded_lines.evaluator.sweep import sweep
from rewarded_lines.evaluator.sweep_options import SweepOptions, takes_sweep_options
from rewarded_lines.progress import SILENT, Progress
from rewarded_lines.projects import Project, load_project
from rewarded_lines.references import looks_local
from rewarded_lines.trace import traced


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

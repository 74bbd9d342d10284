"""The verb `sweep`: every λ of every method, and the SFT model, generated and scored in one engine; resumes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rewarded_lines.data.prompts import Prompt
from rewarded_lines.errors import fail
from rewarded_lines.evaluation.bench import Bench, Producer
from rewarded_lines.evaluation.points import PointSpec
from rewarded_lines.evaluation.records import Run, load_run
from rewarded_lines.evaluation.run_folder import RunFolder, open_run
from rewarded_lines.evaluation.setup import Options, Setup, open_setup
from rewarded_lines.progress import SILENT, Progress
from rewarded_lines.projects import Project, load_project
from rewarded_lines.sweeping.tune import trial_points, tune, validation_prompts


def sweep(
    config: Path | str | Project = "rewarded-lines.yaml",
    *,
    points: int | None = None,
    out: Path | str | None = None,
    engine: str = "vllm",
    device: str = "auto",
    layers: str | None = None,
    tensor_parallel: int = 1,
    offload: str = "auto",
    ray: str | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> Run:
    """Evaluate every method of a project along λ, and its SFT model, on the same prompts with the same seeds.

    Merged weights stream from the policies into the running engine, merged adapters share its batches; no merged
    checkpoint is kept. Each point is one Parquet file, named by the hash of all that determines it: a point that is
    there and whole is not made again. With `sweep.tune` α and β are searched first, on validation prompts only.

    Args:
        config: the project file, or a project already loaded.
        points: how many λ on each edge of the simplex; the project's `sweep.points` by default.
        out: the run folder; `sweep` beside the project file by default.
        engine: "vllm", "hf", or the URL of an OpenAI-compatible server that takes adapters.
        device: where reward models run that do not say it themselves.
        layers: the pattern of the block list, for layouts that are not known.
        tensor_parallel: over how many devices vLLM spreads the model.
        offload: "auto", "always" or "never": whether reward models leave memory when they are not scoring.
        ray: share the points out over Ray workers: the address of a cluster, "auto", or "local" to start one here.
        workers: how many of them; by default one for each `tensor_parallel` GPUs, without GPUs one for each machine.
        overwrite: begin anew where the folder holds a run of another configuration.
        progress: is told of the steps, and of the points that are made.

    Returns:
        The complete run.

    Raises:
        UserError: anything wrong with project, checkpoints, rewards or prompts, before anything is generated; or a
            reward that fails on a response.
    """
    project = config if isinstance(config, Project) else load_project(config)
    count = project.config.sweep.points if points is None else points
    if count < 2:
        raise fail("too few λ", where="--points", expected="2 or more", got=str(count))
    check_workers(ray, workers)
    setup = open_setup(project, Options(engine, device, layers, tensor_parallel, offload), progress)
    validation = validation_prompts(setup)
    folder = Path(out) if out is not None else project.root / "sweep"
    progress.start("laying out the points")
    specs = setup.methods.points(count)
    with open_run(folder, setup, overwrite, progress) as run:
        added = [one for one in run.added() if one.method in setup.methods.specs and setup.methods.declares(one)]
        run.expect(len({*specs, *added}) + trial_points(setup, count))
        write_run(run, [*specs, *added], added)
        with producer(setup, folder, ray, workers, validation, progress) as make:
            tuned = tune(run, make, validation, count)
            found = tuned.as_dict() if tuned else None
            finish_run(run, make, [*specs, *(tuned.points if tuned else []), *added], added, found)
    return load_run(folder)


def check_workers(ray: str | None, workers: int | None) -> None:
    """Refuse a number of workers where there are none.

    Raises:
        UserError: likewise.
    """
    if workers is not None and ray is None:
        raise fail("there are workers with Ray only", where="--workers", remedy="add --ray local, or leave it out")


@contextmanager
def producer(
    setup: Setup,
    folder: Path,
    ray: str | None = None,
    workers: int | None = None,
    also: Sequence[Prompt] = (),
    progress: Progress = SILENT,
) -> Iterator[Producer]:
    """Yield what makes records: a bench here, or workers of a Ray cluster."""
    if ray is None:
        with Bench(setup, folder, also, progress) as bench:
            yield bench
        return
    from rewarded_lines.evaluation.cluster import Cluster

    with Cluster(setup, ray, also, workers, progress) as cluster:
        yield cluster


def finish_run(
    run: RunFolder,
    make: Producer,
    specs: Sequence[PointSpec],
    added: Sequence[PointSpec],
    tuned: Mapping[str, Any] | None = None,
) -> None:
    """Evaluate all that is listed, and say in `run.json` what there is."""
    write_run(run, specs, added, tuned)
    run.fill(run.setup, list(specs), make)
    run.progress.start("closing the run")
    write_run(run, specs, added, tuned, complete=True, **run.account(make))


def write_run(
    run: RunFolder,
    specs: Sequence[PointSpec],
    added: Sequence[PointSpec],
    tuned: Mapping[str, Any] | None = None,
    complete: bool = False,
    **account: Any,
) -> None:
    """Write `run.json`: what belongs to the run, what a search added, and whether all of it is there."""
    keys = {spec: run.setup.key(spec) for spec in specs}
    told = {"tuned": tuned, "added": [point.as_dict() for point in added]}
    # A search of λ goes over what is there; a search of α and β that a kill ended is still to be done.
    untuned = run.setup.project.config.sweep.tune is not None and tuned is None
    run.write(keys, **told, **account, complete=complete and not untuned)

"""The parts of each stage of the demo: what each makes, from which inputs, and how."""

from __future__ import annotations

import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

from rewarded_lines.config import ProjectConfig
from rewarded_lines.demo import movie_reviews as reviews
from rewarded_lines.demo import waiting_recipe
from rewarded_lines.demo.demo_settings import CONFIGURED, DemoSettings
from rewarded_lines.pipelines.recipe_jobs import Part, Watch, digest
from rewarded_lines.projects import PROJECT_FILE, load_project, named_places, save_project
from rewarded_lines.recipe_files import files_root
from rewarded_lines.references import local_path
from rewarded_lines.yaml_files import read_yaml

_PACKAGE = Path(__file__).resolve().parents[1]
# Packages that trained models depend on.
_TRAINS = ("training", "data")


def parts_of(stage: str, settings: DemoSettings, before: str) -> list[Part]:
    """Return the parts of a stage; each hashes its own inputs and `before`, the hash of the stages before it."""
    out, algo = settings.out, settings.algo
    if stage == "policies":
        names = load_project(settings.suite).config.objectives
        return [_recipe(algo, f"{algo} {one}", out / "policies" / one, settings, before, reward=one) for one in names]
    if stage in ("sft", "reward"):
        return [_recipe(stage, stage, out / ("sft" if stage == "sft" else "rewards/positive"), settings, before)]
    if stage == "data":
        return [Part(stage, out / "data", digest([before, *_data_inputs(settings)]), run=partial(_make_data, settings))]
    if stage == "sweep":
        made_from = digest([before, settings.engine])
        return [Part(stage, out / "sweep/points", made_from, run=partial(_run_sweep, settings), resumes=True)]
    if stage == "report":
        return [Part(stage, out / "sweep/report", before, run=partial(_run_report, settings))]
    return [Part(stage, out / "merged/lam=0.50", before, run=partial(_run_merge, settings))]


def brought_files(suite: ProjectConfig) -> list[str]:
    """Return the files that a suite names, relative to its folder: functions, a chat template, schedules."""
    places = named_places(suite.model_dump(mode="json"))
    return list(dict.fromkeys(name for _, kind, name in places if kind in ("code", "schedule")))


def is_shared(name: str, source: Path, out: Path) -> bool:
    """True if a suite's file is the same one for a project in `out`, and need not be copied."""
    return local_path(name, out).resolve() == source.resolve()


def _data_inputs(settings: DemoSettings) -> list[Any]:
    source = settings.corpus or Path(reviews.__file__)
    # Resolved, so that the files that it extends count.
    suite, folder = load_project(settings.suite).config, settings.suite.parent
    files = {*folder.glob("*.py"), *(local_path(name, folder) for name in brought_files(suite))}
    listed = [_text(path) for path in (sorted(source.glob("*.jsonl")) if source.is_dir() else [source])]
    # A key that a later version adds changes nothing while it is not used.
    return [[suite.model_dump(mode="json", exclude_defaults=True), *map(_text, sorted(files))], listed]


def _make_data(settings: DemoSettings, watch: Watch) -> None:
    """Write the corpus, and make the run folder a project: the suite, its files, base and policies."""
    if settings.corpus is None:
        reviews.prepare_reviews(settings.out / "data")
    else:
        shutil.copytree(settings.corpus, settings.out / "data")
    suite = load_project(settings.suite).config
    for name in brought_files(suite):
        source, target = (local_path(name, folder) for folder in (settings.suite.parent, settings.out))
        if not is_shared(name, source, settings.out):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
    policies = {name: f"policies/{name}" for name in suite.objectives}
    save_project(settings.out / PROJECT_FILE, suite.model_copy(update={"base": "sft", "policies": policies}))


def _recipe(recipe: str, name: str, output: Path, settings: DemoSettings, before: str, **options: str) -> Part:
    """Return the part of one recipe, which is run as by `python recipes/X.py --config … --output_dir …`."""
    script = files_root() / "recipes" / f"{recipe}.py"
    config = settings.configs / f"{recipe}.yaml"
    moved = {
        key: str(settings.out) + value.removeprefix(CONFIGURED)
        for key, value in read_yaml(config).items()
        if isinstance(value, str) and (value + "/").startswith(CONFIGURED + "/")
    }
    # A recipe resumes its own killed run and overwrites another one.
    own = {"seed": str(settings.seed), "output_dir": str(output), "overwrite": "true"}
    given = {**moved, **settings.overrides(recipe), **own, **options}
    arguments = [word for key, value in given.items() for word in (f"--{key}", value)]
    # One process: the model is small, and two policies train side by side. -P: a `random.py` in the current folder is
    # not the library's.
    python = (sys.executable, "-P", "-m", waiting_recipe.__name__)
    command = (*python, str(script), "--config", str(config), *arguments)
    # The inputs' hash does not depend on the run folder's path.
    wanted = [word.replace(str(settings.out), "") for word in arguments]
    shared = [_text(path) for package in _TRAINS for path in sorted((_PACKAGE / package).glob("*.py"))]
    return Part(name, output, digest([before, wanted, _text(script), _text(config), shared]), command)


def _run_sweep(settings: DemoSettings, watch: Watch) -> None:
    from rewarded_lines.evaluator.sweep import sweep

    project, out = settings.out / PROJECT_FILE, settings.out / "sweep"
    # New policies replace the old run.
    sweep(project, out=out, engine=settings.engine, overwrite=True, progress=watch("sweep"))


def _run_report(settings: DemoSettings, watch: Watch) -> None:
    from rewarded_lines.reports.report import report

    report(settings.out / "sweep")


def _run_merge(settings: DemoSettings, watch: Watch) -> None:
    from rewarded_lines.merger.merge import merge

    project = load_project(settings.out / PROJECT_FILE)
    policies = {name: project.resolve(path) for name, path in project.config.policies.items()}
    merge(project.resolve("sft"), policies, 0.5, out=settings.out / "merged/lam=0.50")


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")

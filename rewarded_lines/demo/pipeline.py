"""The whole job: data, SFT, reward model, one policy per reward, sweep, report, merge; resumable stage by stage.

Training stages start the recipes with `accelerate launch`, as a user would. A stage is finished if its outputs exist
and its inputs have not changed since; `demo.json` records the inputs' hashes.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import blake3

from rewarded_lines.config import ProjectConfig
from rewarded_lines.demo import movie_reviews as reviews
from rewarded_lines.demo.recipe_jobs import Watch, run_jobs
from rewarded_lines.engines.load_engine import check_engine
from rewarded_lines.errors import Problem, UserError, fail
from rewarded_lines.folders import folder_lock, json_object_in, refuse_foreign, write_json
from rewarded_lines.progress import Progress
from rewarded_lines.projects import PROJECT_FILE, load_project, named_places, read_yaml, save_project
from rewarded_lines.recipe_files import files_root
from rewarded_lines.references import local_path

ALGORITHMS = ("ppo", "dpo", "rloo", "grpo")
STAGES = ("data", "sft", "reward", "policies", "sweep", "report", "merge")
STATE_FILE = "demo.json"
CORPUS_FILES = ("train.jsonl", "validation.jsonl", "test.jsonl", "pairs-train.jsonl", "pairs-test.jsonl")
_PACKAGE = Path(__file__).resolve().parents[1]
# Or the wheel's copy of it.
_CHECKOUT = files_root()
# The run folder in the recipes' demo configs; the command line replaces it.
_CONFIGURED = "runs/demo"
# One process: the model is small, and two policies train side by side.
_LAUNCH = "-m accelerate.commands.launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no"
# Packages that trained models depend on.
_TRAINS = ("training", "data")


class Observer(Protocol):
    """Shows the pipeline's stages."""

    def started(self, stage: str) -> None:
        """Show that a stage starts."""

    def part(self, name: str) -> Progress:
        """Return the progress of a part of the stage that starts."""
        ...

    def finished(self, stage: str, seconds: float, reused: bool) -> None:
        """Show that a stage has ended; `reused`: an earlier run had finished it."""


@dataclass(frozen=True)
class DemoSettings:
    """The run folder, the algorithm, the training seed, the sweep's engine, and the user's own files."""

    out: Path
    algo: str = "ppo"
    seed: int = 0
    engine: str = "vllm"
    configs: Path = _CHECKOUT / "recipes" / "configs" / "demo"
    suite: Path = _CHECKOUT / "eval" / "suites" / "movie_reviews.yaml"
    corpus: Path | None = None


@dataclass(frozen=True)
class _Part:
    """A part of a stage: its output, the hash of its inputs, and a recipe's command or a function that makes it.

    A part that `resumes` goes on in an existing output; others start anew.
    """

    name: str
    output: Path
    made_from: str
    command: tuple[str, ...] = ()
    run: Callable[[DemoSettings, Watch], None] | None = None
    resumes: bool = False


def default_out(algo: str, seed: int) -> Path:
    """Return the run folder for an algorithm and a seed: runs/demo, runs/demo-dpo, runs/demo-seed1 ..."""
    return Path(_CONFIGURED + ("" if algo == "ppo" else f"-{algo}") + (f"-seed{seed}" if seed else ""))


def run_demo(settings: DemoSettings, observer: Observer, until: str = STAGES[-1]) -> dict[str, float]:
    """Run every unfinished stage up to `until`; return the seconds of each stage, also of those finished earlier.

    Raises:
        UserError: the settings do not fit, the folder is not the demo's, or a stage failed.
    """
    _check_settings(settings, until)
    settings.out.mkdir(parents=True, exist_ok=True)
    with folder_lock(settings.out):
        seconds, made_from = dict[str, float](), ""
        for stage in STAGES[: STAGES.index(until) + 1]:
            parts = _parts(stage, settings, made_from)
            made_from = _digest([part.made_from for part in parts])
            seconds[stage] = _run_stage(stage, parts, settings, observer)
        return seconds


def _check_settings(settings: DemoSettings, until: str) -> None:
    for option, value, known in (("--algo", settings.algo, ALGORITHMS), ("--until", until, STAGES)):
        if value not in known:
            raise fail(f"unknown value `{value}`", where=option, expected=", ".join(known))
    if STAGES.index(until) >= STAGES.index("sweep"):
        check_engine(settings.engine)
    _check_inputs(settings)
    if not settings.configs.is_dir():
        remedy = "pass a folder that holds sft.yaml and the others as --configs"
        raise fail("no recipe configs", where=str(settings.configs), remedy=remedy)
    refuse_foreign(settings.out, STATE_FILE)


def _check_inputs(settings: DemoSettings) -> None:
    """Refuse a suite or a corpus that lacks files, or lies in the run folder, which the demo clears."""
    suite = load_project(settings.suite)
    suite.require("rewards", "prompts")
    brought = {name: local_path(name, settings.suite.parent) for name in _brought(suite.config)}
    needed = [(settings.suite, path) for path in brought.values()]
    if settings.corpus is not None:
        needed += [(settings.corpus, settings.corpus / name) for name in CORPUS_FILES]
    problems = [Problem("no such file", where=str(of), got=str(path)) for of, path in needed if not path.is_file()]
    out = settings.out.resolve()
    problems += [
        Problem("not beside the suite, with which it is copied", where=str(settings.suite), got=name)
        for name, source in brought.items()
        if not _is_shared(name, source, settings.out) and out not in (settings.out / name).resolve().parents
    ]
    remedy = "copy it elsewhere, or pass another --out"
    problems += [
        Problem("the demo's input lies in its output", where=str(path), remedy=remedy)
        for path in (*(path for path, _ in suite.files), settings.corpus)
        if path and out in path.resolve().parents
    ]
    if problems:
        raise UserError(problems)


def _brought(suite: ProjectConfig) -> list[str]:
    """Return the files that a suite names, relative to its folder: functions, and a chat template."""
    places = named_places(suite.model_dump(mode="json"))
    return list(dict.fromkeys(name for _, kind, name in places if kind == "code"))


def _is_shared(name: str, source: Path, out: Path) -> bool:
    """True if a suite's file is the same one for a project in `out`, and need not be copied."""
    return local_path(name, out).resolve() == source.resolve()


def _objectives(suite: ProjectConfig) -> list[str]:
    return [name for name, spec in suite.rewards.items() if spec.role != "audit"]


def _run_stage(stage: str, parts: list[_Part], settings: DemoSettings, observer: Observer) -> float:
    # Each finished part's hash of inputs and seconds.
    finished = json_object_in(settings.out / STATE_FILE)
    missing = [part for part in parts if _seconds(part, finished) is None]
    observer.started(stage)
    started = time.perf_counter()
    for part in missing:
        # It has other inputs, or was killed before it was recorded.
        if not part.resumes and part.output.is_dir():
            shutil.rmtree(part.output)
    if commands := {part.name: part.command for part in missing if part.command}:
        run_jobs(commands, settings.out / "logs", observer.part)
    for part in missing:
        if part.run:
            part.run(settings, observer.part)
        finished[part.name] = {"made_from": part.made_from, "seconds": round(time.perf_counter() - started, 1)}
        write_json(settings.out / STATE_FILE, finished)
    # Parts run at the same time, so a stage takes as long as its longest part.
    seconds = max(_seconds(part, finished) or 0.0 for part in parts)
    observer.finished(stage, seconds, reused=not missing)
    return seconds


def _seconds(part: _Part, finished: dict[str, Any]) -> float | None:
    """Return how long a finished part took, else None."""
    entry = finished.get(part.name, {})
    return float(entry["seconds"]) if entry.get("made_from") == part.made_from and part.output.exists() else None


def _parts(stage: str, settings: DemoSettings, before: str) -> list[_Part]:
    """Return the parts of a stage; each hashes its own inputs and `before`, the hash of the stages before it."""
    out, algo = settings.out, settings.algo
    if stage == "policies":
        names = _objectives(load_project(settings.suite).config)
        return [_recipe(algo, f"{algo} {one}", out / "policies" / one, settings, before, reward=one) for one in names]
    if stage in ("sft", "reward"):
        return [_recipe(stage, stage, out / ("sft" if stage == "sft" else "rewards/positive"), settings, before)]
    if stage == "data":
        return [_Part(stage, out / "data", _digest([before, *_data_inputs(settings)]), run=_make_data)]
    if stage == "sweep":
        made_from = _digest([before, settings.engine])
        return [_Part(stage, out / "sweep/points", made_from, run=_run_sweep, resumes=True)]
    if stage == "report":
        return [_Part(stage, out / "sweep/report", before, run=_run_report)]
    return [_Part(stage, out / "merged/lam=0.50", before, run=_run_merge)]


def _data_inputs(settings: DemoSettings) -> list[Any]:
    source = settings.corpus or Path(reviews.__file__)
    # Resolved, so that the files that it extends count.
    suite, folder = load_project(settings.suite).config, settings.suite.parent
    files = {*folder.glob("*.py"), *(local_path(name, folder) for name in _brought(suite))}
    listed = [_text(path) for path in (sorted(source.glob("*.jsonl")) if source.is_dir() else [source])]
    return [[suite.model_dump(mode="json"), *map(_text, sorted(files))], listed]


def _make_data(settings: DemoSettings, watch: Watch) -> None:
    """Write the corpus, and make the run folder a project: the suite, its files, base and policies."""
    if settings.corpus is None:
        reviews.prepare_reviews(settings.out / "data")
    else:
        shutil.copytree(settings.corpus, settings.out / "data")
    suite = load_project(settings.suite).config
    for name in _brought(suite):
        source, target = (local_path(name, folder) for folder in (settings.suite.parent, settings.out))
        if not _is_shared(name, source, settings.out):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
    policies = {name: f"policies/{name}" for name in _objectives(suite)}
    save_project(settings.out / PROJECT_FILE, suite.model_copy(update={"base": "sft", "policies": policies}))


def _recipe(recipe: str, name: str, output: Path, settings: DemoSettings, before: str, **options: str) -> _Part:
    """Return the part of one recipe: `accelerate launch recipes/X.py --config … --output_dir …`."""
    script = _CHECKOUT / "recipes" / f"{recipe}.py"
    config = settings.configs / f"{recipe}.yaml"
    moved = {
        key: str(settings.out) + value.removeprefix(_CONFIGURED)
        for key, value in read_yaml(config).items()
        if isinstance(value, str) and (value + "/").startswith(_CONFIGURED + "/")
    }
    # A recipe resumes its own killed run and overwrites another one.
    own = {"seed": str(settings.seed), "output_dir": str(output), "overwrite": "true"}
    arguments = [word for key, value in {**moved, **own, **options}.items() for word in (f"--{key}", value)]
    # Without --quiet, the launcher prints a traceback below the recipe's own message.
    command = (sys.executable, *_LAUNCH.split(), "--quiet", str(script), "--config", str(config), *arguments)
    # The inputs' hash does not depend on the run folder's path.
    wanted = [word.replace(str(settings.out), "") for word in arguments]
    shared = [_text(path) for package in _TRAINS for path in sorted((_PACKAGE / package).glob("*.py"))]
    return _Part(name, output, _digest([before, wanted, _text(script), _text(config), shared]), command)


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


def _digest(content: Any) -> str:
    return blake3.blake3(json.dumps(content).encode()).hexdigest(length=16)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")

"""The whole job: data, SFT, reward model, one policy per reward, sweep, report, merge; resumable stage by stage.

Training stages are the recipes themselves, started with `accelerate launch` as a user would. A stage is done when its
outputs are there and were made from what it would be made from now; `demo.json` keeps that account.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import blake3

from rewarded_lines.config import ProjectConfig
from rewarded_lines.demo import reviews
from rewarded_lines.demo.jobs import Job, Watch, run_jobs
from rewarded_lines.engines.load import check_engine
from rewarded_lines.errors import Problem, UserError, fail
from rewarded_lines.folders import folder_lock, refuse_foreign, write_json
from rewarded_lines.progress import Progress
from rewarded_lines.projects import PROJECT_FILE, load_project, read_yaml, save_project
from rewarded_lines.references import local_path

ALGORITHMS = ("ppo", "dpo", "rloo")
STAGES = ("data", "sft", "reward", "policies", "sweep", "report", "merge")
STATE_FILE = "demo.json"
CORPUS_FILES = ("train.jsonl", "validation.jsonl", "test.jsonl", "pairs-train.jsonl", "pairs-test.jsonl")
_PACKAGE = Path(__file__).resolve().parents[1]
_CHECKOUT = _PACKAGE.parent
# The folder that the recipes' demo configs name; another one takes its place on the command line.
_CONFIGURED = "runs/demo"


class Observer(Protocol):
    """Whoever watches the pipeline."""

    def started(self, stage: str) -> None:
        """A stage begins."""

    def part(self, name: str) -> Progress:
        """A part of the stage begins, and tells of its steps what is returned."""
        ...

    def finished(self, stage: str, seconds: float, reused: bool) -> None:
        """A stage ended after so many seconds, or was found finished by an earlier run."""


@dataclass(frozen=True)
class DemoSettings:
    """What can be chosen: the algorithm, the training seed, the run folder, and where the recipes' configs lie."""

    out: Path
    algo: str = "ppo"
    seed: int = 0
    engine: str = "vllm"
    configs: Path = _CHECKOUT / "recipes" / "configs" / "demo"
    suite: Path = _CHECKOUT / "eval" / "suites" / "movie_reviews.yaml"
    corpus: Path | None = None


@dataclass(frozen=True)
class _Part:
    """A piece of a stage that is finished or not: what it makes, from what, and how.

    `goes_on` says that it knows by itself what is left to do in an output that is there.
    """

    name: str
    output: Path
    made_from: str
    job: Job | None = None
    run: Callable[[Watch], None] | None = None
    goes_on: bool = False


def default_out(algo: str, seed: int) -> Path:
    """Return the run folder for an algorithm and a seed: runs/demo, runs/demo-dpo, runs/demo-seed1 ..."""
    return Path(_CONFIGURED + ("" if algo == "ppo" else f"-{algo}") + (f"-seed{seed}" if seed else ""))


def run_demo(settings: DemoSettings, observer: Observer, until: str = STAGES[-1]) -> dict[str, float]:
    """Run every stage that is not finished yet, up to `until`.

    Args:
        settings: what to run, and where.
        observer: is told of every stage.
        until: the last stage to run, one of `STAGES`.

    Returns:
        Seconds of each stage, those of earlier runs included.

    Raises:
        UserError: the settings do not fit, the folder is not the demo's, or a stage failed.
    """
    _check_settings(settings, until)
    settings.out.mkdir(parents=True, exist_ok=True)
    with folder_lock(settings.out):
        account = _Account(settings.out / STATE_FILE)
        seconds: dict[str, float] = {}
        made_from = ""
        for stage in STAGES[: STAGES.index(until) + 1]:
            parts = _parts(stage, settings, made_from)
            made_from = _digest([part.made_from for part in parts])
            seconds[stage] = _run_stage(stage, parts, account, observer)
        return seconds


class _Account:
    """What `demo.json` says: for every finished part what it was made from, and how long it took."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._finished: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self._finished = {}

    def seconds(self, part: _Part) -> float | None:
        """Return how long the part took when it is finished, else None."""
        entry = self._finished.get(part.name, {})
        if entry.get("made_from") != part.made_from or not part.output.exists():
            return None
        return float(entry["seconds"])

    def finish(self, part: _Part, seconds: float) -> None:
        self._finished[part.name] = {"made_from": part.made_from, "seconds": round(seconds, 1)}
        write_json(self._path, self._finished)


def _check_settings(settings: DemoSettings, until: str) -> None:
    for option, value, known in (("--algo", settings.algo, ALGORITHMS), ("--until", until, STAGES)):
        if value not in known:
            raise fail(f"unknown value `{value}`", where=option, expected=", ".join(known))
    if STAGES.index(until) >= STAGES.index("sweep"):
        check_engine(settings.engine)
    _check_inputs(settings)
    if not settings.configs.is_dir():
        raise fail(
            "the recipes are not there",
            where=str(settings.configs),
            remedy="run the demo from a clone of the repository, as `make demo` does",
        )
    refuse_foreign(settings.out, STATE_FILE)


def _check_inputs(settings: DemoSettings) -> None:
    """Refuse a suite or a corpus that is not whole, or that the run folder, which the demo clears, would swallow."""
    suite = load_project(settings.suite)
    suite.require("rewards", "prompts")
    brought = {name: local_path(name, settings.suite.parent) for name in _brought(suite.config)}
    needed = [(settings.suite, path) for path in brought.values()]
    if settings.corpus is not None:
        needed += [(settings.corpus, settings.corpus / name) for name in CORPUS_FILES]
    problems = [Problem("no such file", where=str(of), got=str(path)) for of, path in needed if not path.is_file()]
    problems += [
        Problem("not beside the suite, with which it is copied", where=str(settings.suite), got=name)
        for name, path in brought.items()
        if _astray(name, path, settings.out)
    ]
    own = [path for path, _ in suite.files] + ([settings.corpus] if settings.corpus else [])
    problems += [
        Problem(
            "the demo's input lies in its output", where=str(path), remedy="copy it elsewhere, or pass another --out"
        )
        for path in own
        if settings.out.resolve() in path.resolve().parents
    ]
    if problems:
        raise UserError(problems)


def _brought(suite: ProjectConfig) -> list[str]:
    """Return the files that a suite brings with it, relative to its folder: functions, and how a chat is written."""
    tune = [suite.sweep.tune.prompts] if suite.sweep.tune else []
    data = [one.rows for one in (suite.prompts, *suite.control.values(), *tune) if one]
    functions = [*(spec.function for spec in suite.rewards.values()), *data]
    files = [(function or "").rpartition(":")[0] for function in functions]
    named = [name for name in files if name.endswith(".py")] + [suite.generation.chat_template or ""]
    return [name for name in dict.fromkeys(named) if name]


def _stays(name: str, source: Path, out: Path) -> bool:
    """Say whether a file that a suite names is the same one to a project in `out`."""
    return local_path(name, out).resolve() == source.resolve()


def _astray(name: str, source: Path, out: Path) -> bool:
    """Say whether the copy of a file that a suite names would lie outside `out`."""
    return not _stays(name, source, out) and out.resolve() not in (out / name).resolve().parents


def _objectives(suite: ProjectConfig) -> list[str]:
    """Return the rewards that a policy is trained for."""
    return [name for name, spec in suite.rewards.items() if spec.role != "audit"]


def _run_stage(stage: str, parts: list[_Part], account: _Account, observer: Observer) -> float:
    missing = [part for part in parts if account.seconds(part) is None]
    observer.started(stage)
    started = time.perf_counter()
    for part in missing:
        # A part that was made from something else, or that a kill left without its entry.
        if not part.goes_on:
            _remove(part.output)
    jobs = {part.job.name: part for part in missing if part.job}
    if jobs:
        run_jobs([part.job for part in jobs.values() if part.job], observer.part)
    for part in missing:
        if part.run:
            part.run(observer.part)
        account.finish(part, time.perf_counter() - started)
    # Parts of one stage run at the same time, so the stage took as long as its longest part.
    seconds = max(account.seconds(part) or 0.0 for part in parts)
    observer.finished(stage, seconds, reused=not missing)
    return seconds


def _parts(stage: str, settings: DemoSettings, made_from: str) -> list[_Part]:
    """Return the parts of a stage, each bound to what it is made from: its own inputs, and the stage before it."""
    makers: Mapping[str, Callable[[DemoSettings, str], list[_Part]]] = {
        "data": _data,
        "sft": lambda s, before: [_recipe("sft", "sft", s.out / "sft", s, before)],
        "reward": lambda s, before: [_recipe("reward", "reward", s.out / "rewards/positive", s, before)],
        "policies": _policies,
        "sweep": _sweep,
        "report": _report,
        "merge": _merge,
    }
    return makers[stage](settings, made_from)


def _data(settings: DemoSettings, before: str) -> list[_Part]:
    out = settings.out

    def run(watch: Watch) -> None:
        if settings.corpus is None:
            reviews.prepare_reviews(out / "data")
        else:
            shutil.copytree(settings.corpus, out / "data")
        _write_project(settings)

    source = settings.corpus or Path(reviews.__file__)
    # The suite as it was resolved, with what it may extend.
    suite, folder = load_project(settings.suite).config, settings.suite.parent
    files = {*folder.glob("*.py"), *(local_path(name, folder) for name in _brought(suite))}
    inputs = [suite.model_dump(mode="json"), *map(_text, sorted(files))]
    listed = [_text(path) for path in (sorted(source.glob("*.jsonl")) if source.is_dir() else [source])]
    return [_Part("data", out / "data", _digest([before, inputs, listed]), run=run)]


def _write_project(settings: DemoSettings) -> None:
    """Make the run folder a project of its own: the suite with base and policies, and the files that it brings."""
    suite = load_project(settings.suite).config
    policies = {name: f"policies/{name}" for name in _objectives(suite)}
    for name in _brought(suite):
        source, target = (local_path(name, folder) for folder in (settings.suite.parent, settings.out))
        if not _stays(name, source, settings.out):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
    config = suite.model_copy(update={"base": "sft", "policies": policies})
    save_project(settings.out / PROJECT_FILE, config)


def _policies(settings: DemoSettings, before: str) -> list[_Part]:
    return [
        _recipe(
            settings.algo,
            f"{settings.algo} {name}",
            settings.out / "policies" / name,
            settings,
            before,
            reward=name,
        )
        for name in _objectives(load_project(settings.suite).config)
    ]


def _recipe(recipe: str, name: str, output: Path, settings: DemoSettings, before: str, **options: str) -> _Part:
    """Return the part that one recipe makes: `accelerate launch recipes/X.py --config … --output_dir …`."""
    script = _CHECKOUT / "recipes" / f"{recipe}.py"
    config = settings.configs / f"{recipe}.yaml"
    overrides = {**_moved_paths(config, settings.out), "seed": str(settings.seed), "output_dir": str(output)}
    # What a kill has left of the same run is gone on with; what is left of another one is the demo's to replace.
    overrides["overwrite"] = "true"
    arguments = [word for key, value in (overrides | options).items() for word in (f"--{key}", value)]
    # One process: the demo's model is small, and two policies train side by side.
    launch = (sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1")
    # --quiet: a recipe that refuses its input says why; the launcher's own traceback would only hide that.
    plain = ("--mixed_precision", "no", "--dynamo_backend", "no", "--quiet")
    job = Job(
        name=name,
        command=(*launch, *plain, str(script), "--config", str(config), *arguments),
        log=settings.out / "logs" / f"{name.replace(' ', '-')}.log",
        progress=settings.out / "logs" / f"{name.replace(' ', '-')}.jsonl",
    )
    # What the model is made from, wherever the run folder stands and however it is spelt.
    wanted = [word.replace(str(settings.out), "") for word in arguments]
    wings = ("training", "rewarding", "learning", "data")
    shared = [_text(path) for wing in wings for path in sorted((_PACKAGE / wing).glob("*.py"))]
    return _Part(name, output, _digest([before, wanted, _text(script), _text(config), shared]), job=job)


def _moved_paths(config: Path, out: Path) -> dict[str, str]:
    """Return the paths in a demo config, with the run folder in the place of `runs/demo`."""
    return {
        key: str(out) + value.removeprefix(_CONFIGURED)
        for key, value in read_yaml(config).items()
        if isinstance(value, str) and (value + "/").startswith(_CONFIGURED + "/")
    }


def _sweep(settings: DemoSettings, before: str) -> list[_Part]:
    def run(watch: Watch) -> None:
        from rewarded_lines.sweeping.sweep import sweep

        out = settings.out / "sweep"
        # Policies trained anew make another run in the place of the old one.
        sweep(settings.out / PROJECT_FILE, out=out, engine=settings.engine, overwrite=True, progress=watch("sweep"))

    made_from = _digest([before, settings.engine])
    return [_Part("sweep", settings.out / "sweep" / "points", made_from, run=run, goes_on=True)]


def _report(settings: DemoSettings, before: str) -> list[_Part]:
    def run(watch: Watch) -> None:
        from rewarded_lines.reporting.report import report

        report(settings.out / "sweep")

    return [_Part("report", settings.out / "sweep" / "report", before, run=run)]


def _merge(settings: DemoSettings, before: str) -> list[_Part]:
    target = settings.out / "merged" / "lam=0.50"

    def run(watch: Watch) -> None:
        from rewarded_lines.merging.merge import merge

        project = load_project(settings.out / PROJECT_FILE)
        policies = {name: project.resolve(path) for name, path in project.config.policies.items()}
        merge(project.resolve("sft"), policies, 0.5, out=target)

    return [_Part("merge", target, before, run=run)]


def _digest(content: Any) -> str:
    return blake3.blake3(json.dumps(content).encode()).hexdigest(length=16)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)

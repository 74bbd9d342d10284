"""The whole job: data, SFT, reward model, one policy per reward, sweep, report, merge; resumable stage by stage.

Training stages run the recipes as programs, as a user would. While a stage runs, the next one's recipes already load
their libraries. A stage is finished if its outputs exist and its inputs have not changed since; `demo.json` records the
inputs' hashes.
"""

from __future__ import annotations

from contextlib import suppress
from itertools import zip_longest
from threading import Thread
from typing import Protocol

from rewarded_lines.demo.demo_settings import DemoSettings
from rewarded_lines.demo.parts import brought_files, is_shared, parts_of
from rewarded_lines.demo.stages import ALGORITHMS, PLAN, STAGES
from rewarded_lines.engines.load_engine import check_engine
from rewarded_lines.engines.vllm_versions import load_vllm
from rewarded_lines.errors import Problem, UserError, fail
from rewarded_lines.extras import require
from rewarded_lines.folders import folder_lock, refuse_foreign
from rewarded_lines.pipelines.recipe_jobs import FinishedParts, Part, RecipeJobs, digest
from rewarded_lines.progress import Progress
from rewarded_lines.projects import load_project
from rewarded_lines.references import local_path

STATE_FILE = "demo.json"
CORPUS_FILES = ("train.jsonl", "validation.jsonl", "test.jsonl", "pairs-train.jsonl", "pairs-test.jsonl")


# With these as the last stage, there is a sweep.
_SWEPT = STAGES[STAGES.index("sweep") :]


class Observer(Protocol):
    """Shows the pipeline's stages."""

    def started(self, stage: str) -> None:
        """Show that a stage starts."""

    def part(self, name: str) -> Progress:
        """Return the progress of a part of the stage that starts."""
        ...

    def finished(self, stage: str, seconds: float, reused: bool) -> None:
        """Show that a stage has ended; `reused`: an earlier run had finished it."""


def run_demo(settings: DemoSettings, observer: Observer, until: str = STAGES[-1]) -> dict[str, float]:
    """Run every unfinished stage up to `until`; return the seconds of each stage, also of those finished earlier.

    Raises:
        UserError: the settings do not fit, the folder is not the demo's, or a stage failed.
    """
    _check_settings(settings, until)
    settings.out.mkdir(parents=True, exist_ok=True)
    with folder_lock(settings.out), RecipeJobs(settings.out / "logs", small=True) as jobs:
        finished = FinishedParts(settings.out / STATE_FILE)
        stages, made_from = list[tuple[str, list[Part]]](), ""
        for stage in STAGES[: STAGES.index(until) + 1]:
            stages.append((stage, parts_of(stage, settings, made_from)))
            made_from = digest([part.made_from for part in stages[-1][1]])
        if until in _SWEPT and settings.engine == "vllm" and finished.missing(dict(stages)["sweep"]):
            # A thread of this process: the sweep runs here, and until then a core is often free.
            Thread(target=_load_vllm, args=(settings,), daemon=True).start()
        seconds = dict[str, float]()
        for (stage, parts), (_, following) in zip_longest(stages, stages[1:], fillvalue=("", [])):
            observer.started(stage)
            reused = not finished.missing(parts)
            finished.make(parts, jobs, observer.part, following)
            # Parts run at the same time, so a stage takes as long as its longest part.
            seconds[stage] = max(finished.seconds(part) or 0.0 for part in parts)
            observer.finished(stage, seconds[stage], reused)
        return seconds


def _load_vllm(settings: DemoSettings) -> None:
    """Import vLLM. The sweep imports it again, and then a fault is told."""
    with suppress(Exception):
        load_vllm(load_project(settings.suite).config.engine)


def _check_settings(settings: DemoSettings, until: str) -> None:
    for option, value, known in (("--algo", settings.algo, ALGORITHMS), ("--until", until, STAGES)):
        if value not in known:
            raise fail(f"unknown value `{value}`", where=option, expected=", ".join(known))
    needed = dict.fromkeys(PLAN[stage].extra for stage in STAGES[: STAGES.index(until) + 1])
    if extras := ",".join(filter(None, needed)):
        require(extras, "rewarded-lines demo")
    if until in _SWEPT:
        check_engine(settings.engine)
    _check_inputs(settings)
    for option, chosen, what in (
        ("--full", settings.full, "how long training is"),
        ("--lora", settings.lora, "what is trained"),
    ):
        if chosen and settings.own_configs:
            raise fail(f"own configs say themselves {what}", where=option, remedy=f"leave out {option}")
    if not settings.configs.is_dir():
        remedy = "pass a folder that holds sft.yaml and the others as --configs"
        raise fail("no recipe configs", where=str(settings.configs), remedy=remedy)
    refuse_foreign(settings.out, STATE_FILE)


def _check_inputs(settings: DemoSettings) -> None:
    """Refuse a suite or a corpus that lacks files, or lies in the run folder, which the demo clears."""
    suite = load_project(settings.suite)
    suite.require("rewards", "prompts")
    brought = {name: local_path(name, settings.suite.parent) for name in brought_files(suite.config)}
    needed = [(settings.suite, path) for path in brought.values()]
    if settings.corpus is not None:
        needed += [(settings.corpus, settings.corpus / name) for name in CORPUS_FILES]
    problems = [Problem("no such file", where=str(of), got=str(path)) for of, path in needed if not path.is_file()]
    out = settings.out.resolve()
    problems += [
        Problem("not beside the suite, with which it is copied", where=str(settings.suite), got=name)
        for name, source in brought.items()
        if not is_shared(name, source, settings.out) and out not in (settings.out / name).resolve().parents
    ]
    remedy = "copy it elsewhere, or pass another --out"
    problems += [
        Problem("the demo's input lies in its output", where=str(path), remedy=remedy)
        for path in (*(path for path, _ in suite.files), settings.corpus)
        if path and out in path.resolve().parents
    ]
    if problems:
        raise UserError(problems)

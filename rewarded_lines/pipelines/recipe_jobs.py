"""Parts of a long job: recipes as child processes, which parts are finished, and the work on the others.

Recipes start together, report through progress files and end with the parent. A part is finished if its output exists
and its inputs have not changed since. A JSON file of the job keeps the hash of each part's inputs.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import blake3

from rewarded_lines.errors import fail
from rewarded_lines.folders import json_object_in, write_json
from rewarded_lines.processes import DIE_WITH_PARENT, die_with_parent
from rewarded_lines.progress import SILENT, Progress

_POLL_SECONDS = 0.2
_LINES_SHOWN = 12
_LAUNCHER = "subprocess.CalledProcessError: "
_KEEP_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 33),
    "MALLOC_TOP_PAD_": str(1 << 26),
}
# Returns the progress of a part of a stage, given its name.
Watch = Callable[[str], Progress]


class RecipeJobs:
    """Runs recipes as child processes; those that come next may load their libraries meanwhile, and wait.

    Leaving its block kills all that are left.
    """

    def __init__(self, logs: Path, small: bool = False, share_cores: bool = False) -> None:
        """Start nothing yet. `logs` receives each command's output, NAME.log, and its progress, NAME.jsonl.

        Commands that `share_cores` get as many threads as each has cores. `accelerate launch` would take one thread,
        or give all cores to each command. Models that are `small` share them too, and need no network.
        """
        self._logs, self._small, self._share_cores = logs, small, share_cores
        self._jobs: dict[str, _Job] = {}

    def __enter__(self) -> RecipeJobs:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Kill the commands that still run or wait."""
        self._end(list(self._jobs))

    def run(self, commands: Mapping[str, Sequence[str]], watch: Watch) -> None:
        """Run named commands at the same time, and wait for all.

        Raises:
            UserError: a command failed; the message ends with the last lines of its log. The others are killed.
        """
        self.prepare(commands)
        try:
            for name in commands:
                self._jobs[name].go_on(watch(name))
            running = list(commands)
            while running:
                time.sleep(_POLL_SECONDS)
                running = [name for name in running if not self._jobs[name].over()]
        finally:
            self._end(list(commands))

    def prepare(self, commands: Mapping[str, Sequence[str]]) -> None:
        """Start commands that read a line from stdin before they work; `run` writes it."""
        self._logs.mkdir(parents=True, exist_ok=True)
        threads = max(1, len(os.sched_getaffinity(0)) // max(1, len(commands)))
        environment = {"OMP_NUM_THREADS": str(threads)} if self._small or self._share_cores else {}
        environment |= _for_small_models() if self._small else {}
        for name, command in commands.items():
            if name not in self._jobs:
                self._jobs[name] = _Job(name, command, self._logs / re.sub(r"[^\w.+-]", "-", name), environment)

    def _end(self, names: Sequence[str]) -> None:
        for process in [job.process for name in names if (job := self._jobs.pop(name, None))]:
            process.kill()
            process.communicate()


class _Job:
    """A running recipe, and the steps reported so far."""

    def __init__(self, name: str, command: Sequence[str], file: Path, environment: Mapping[str, str]) -> None:
        self._name, self._progress = name, SILENT
        self._log, self._steps = Path(f"{file}.log"), Path(f"{file}.jsonl")
        self._done: int | None = None
        self._steps.unlink(missing_ok=True)
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | environment | {"REWARDED_LINES_PROGRESS": str(self._steps), DIE_WITH_PARENT: "1"},
                preexec_fn=_follow_parent,
            )

    def go_on(self, progress: Progress) -> None:
        """Let the recipe begin, and show its progress there."""
        self._progress = progress
        assert self.process.stdin is not None
        # One that has ended has said why in its log.
        with suppress(BrokenPipeError), self.process.stdin as stdin:
            stdin.write(b"\n")

    def over(self) -> bool:
        """Report new steps; return whether the recipe has ended. A failed recipe raises UserError."""
        self._report()
        code = self.process.poll()
        if code:
            said = self._log.read_text(encoding="utf-8", errors="replace")
            if _LAUNCHER in said:
                # `accelerate launch` ends with its own traceback, which tells nothing.
                said = said.rpartition("Traceback (")[0]
            lines = said.splitlines()
            raise fail(
                f"the stage failed with exit code {code}",
                where=self._name,
                got="\n    ".join(["the last lines of its log:", *lines[-_LINES_SHOWN:]]),
                remedy=f"the whole log is {self._log}; started again, it goes on from here",
            )
        return code == 0

    def _report(self) -> None:
        try:
            last = json.loads(self._steps.read_text(encoding="utf-8").splitlines()[-1])
            done, total = int(last["step"]), int(last["max_steps"])
        except (OSError, IndexError, ValueError, KeyError):
            # No whole line yet.
            return
        self._progress.advance(done - (self._done or 0))
        if self._done is None:
            # Steps from a checkpoint do not count in the rate.
            self._progress.expect(total)
            self._progress.start("training", counted=True)
        self._done = done


def _for_small_models() -> dict[str, str]:
    return {
        # Threads that spin while waiting slow a step thirtyfold as soon as another process needs a core.
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
        # The demo needs no network; a user's own configs with Hub ids need HF_HUB_OFFLINE=0.
        "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1"),
        # glibc would give the memory of large tensors back after each use; to get it again takes a fifth of a step.
        **{name: os.environ.get(name, value) for name, value in _KEEP_MEMORY.items()},
    }


def _follow_parent() -> None:
    # The variable in the child's own environment is for a recipe that it launches.
    os.environ[DIE_WITH_PARENT] = "1"
    die_with_parent()


@dataclass(frozen=True)
class Part:
    """A part of a stage: its output, the hash of its inputs, and what makes it.

    A recipe's `command` comes first, then the function `run`. A part that `resumes` goes on in an existing output;
    others start anew.
    """

    name: str
    output: Path
    made_from: str
    command: tuple[str, ...] = ()
    run: Callable[[Watch], None] | None = None
    resumes: bool = False


class FinishedParts:
    """The finished parts of a job, kept in `file`."""

    def __init__(self, file: Path) -> None:
        """Read nothing yet."""
        self.file = file

    def seconds(self, part: Part) -> float | None:
        """Return how long a finished part took, else None."""
        entry = self._entry(part)
        return float(entry["seconds"]) if entry.get("made_from") == part.made_from and part.output.exists() else None

    def took(self, part: Part) -> float | None:
        """Return how long the part of this name took last, even if it must be made again."""
        return self._entry(part).get("seconds")

    def missing(self, parts: Sequence[Part]) -> list[Part]:
        """Return the parts that are to be made."""
        return [part for part in parts if self.seconds(part) is None]

    def make(self, parts: Sequence[Part], jobs: RecipeJobs, watch: Watch, following: Sequence[Part] = ()) -> None:
        """Make the missing parts side by side, and record each; the recipes of `following` load meanwhile.

        Raises:
            UserError: a recipe failed.
        """
        missing, started = self.missing(parts), time.perf_counter()
        for part in missing:
            # It has other inputs, or was killed before it was recorded.
            if not part.resumes and part.output.is_dir():
                shutil.rmtree(part.output)
        if missing:
            jobs.prepare(_commands(missing))
            jobs.prepare(_commands(self.missing(following)))
        jobs.run(_commands(missing), watch)
        for part in missing:
            if part.run:
                part.run(watch)
            entry = {"made_from": part.made_from, "seconds": round(time.perf_counter() - started, 1)}
            write_json(self.file, {**json_object_in(self.file), part.name: entry})

    def _entry(self, part: Part) -> dict[str, Any]:
        found: dict[str, Any] = json_object_in(self.file).get(part.name, {})
        return found


def digest(content: Any) -> str:
    """Return a hash of content that JSON can hold."""
    return blake3.blake3(json.dumps(content).encode()).hexdigest(length=16)


def _commands(parts: Sequence[Part]) -> dict[str, tuple[str, ...]]:
    """Return the commands of the parts that recipes make."""
    return {part.name: part.command for part in parts if part.command}

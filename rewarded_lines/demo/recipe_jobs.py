"""Recipes as child processes: they start together, report through progress files and end with the parent."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rewarded_lines.errors import fail
from rewarded_lines.processes import DIE_WITH_PARENT, die_with_parent
from rewarded_lines.progress import Progress

_POLL_SECONDS = 0.2
_LINES_SHOWN = 12
# Returns the progress of a part of a stage, given its name.
Watch = Callable[[str], Progress]


def run_jobs(commands: Mapping[str, Sequence[str]], logs: Path, watch: Watch) -> None:
    """Run named recipe commands at the same time, each with its share of the cores, and wait for all.

    The folder `logs` receives each command's output, NAME.log, and its progress, NAME.jsonl.

    Raises:
        UserError: a command failed; the message ends with the last lines of its log. The others are killed.
    """
    threads = max(1, len(os.sched_getaffinity(0)) // len(commands))
    logs.mkdir(parents=True, exist_ok=True)
    running: list[_Job] = []
    try:
        for name, command in commands.items():
            running.append(_Job(name, command, logs / name.replace(" ", "-"), threads, watch(name)))
        while running:
            time.sleep(_POLL_SECONDS)
            running = [job for job in running if not job.over()]
    finally:
        for job in running:
            job.process.kill()
            job.process.wait()


class _Job:
    """A running recipe, and the steps reported so far."""

    def __init__(self, name: str, command: Sequence[str], file: Path, threads: int, progress: Progress) -> None:
        self._name, self._progress = name, progress
        self._log, self._steps = Path(f"{file}.log"), Path(f"{file}.jsonl")
        self._done: int | None = None
        self._steps.unlink(missing_ok=True)
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            # Threads that spin while waiting slow a step thirtyfold as soon as another process needs a core.
            "OMP_WAIT_POLICY": "PASSIVE",
            "TOKENIZERS_PARALLELISM": "false",
            # The demo needs no network; a user's own configs with Hub ids need HF_HUB_OFFLINE=0.
            "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1"),
            "REWARDED_LINES_PROGRESS": str(self._steps),
            # For the recipe below the launcher; the launcher itself gets `preexec_fn`.
            DIE_WITH_PARENT: str(os.getpid()),
        }
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                preexec_fn=_follow_parent,
            )

    def over(self) -> bool:
        """Report new steps; return whether the recipe has ended. A failed recipe raises UserError."""
        self._report()
        code = self.process.poll()
        if code:
            lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
            raise fail(
                f"the stage failed with exit code {code}",
                where=self._name,
                got="\n    ".join(["the last lines of its log:", *lines[-_LINES_SHOWN:]]),
                remedy=f"the whole log is {self._log}; start the demo again to go on from here",
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


def _follow_parent() -> None:
    os.environ[DIE_WITH_PARENT] = "1"
    die_with_parent()

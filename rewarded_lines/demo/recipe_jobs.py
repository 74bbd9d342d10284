"""Recipes as child processes: started together, watched through their progress files, never left behind."""

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
# Called with the name of a part of a stage that begins; what it returns is told of the part's steps.
Watch = Callable[[str], Progress]


def run_jobs(commands: Mapping[str, Sequence[str]], logs: Path, watch: Watch) -> None:
    """Run commands at the same time, the cores shared out among them, and wait for all.

    Args:
        commands: of recipes, by name.
        logs: the folder that gets what each prints, NAME.log, and how far it is, NAME.jsonl.
        watch: called with each name.

    Raises:
        UserError: a command failed; the others are stopped, and the message ends with the last lines of its log.
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
    """A running recipe, and how many of its steps were told."""

    def __init__(self, name: str, command: Sequence[str], file: Path, threads: int, progress: Progress) -> None:
        self._name, self._progress = name, progress
        self._log, self._steps = Path(f"{file}.log"), Path(f"{file}.jsonl")
        self._done: int | None = None
        self._steps.unlink(missing_ok=True)
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            # Threads that wait by spinning make a step thirty times slower as soon as anything else wants a core.
            "OMP_WAIT_POLICY": "PASSIVE",
            "TOKENIZERS_PARALLELISM": "false",
            # The demo needs no network; configs of one's own that name Hub ids need HF_HUB_OFFLINE=0.
            "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1"),
            "REWARDED_LINES_PROGRESS": str(self._steps),
            # The launcher is told by `preexec_fn`; the recipe below it reads the variable.
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
        """Tell the steps that are new; say whether the recipe has ended.

        Raises:
            UserError: it failed.
        """
        self._tell()
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

    def _tell(self) -> None:
        try:
            last = json.loads(self._steps.read_text(encoding="utf-8").splitlines()[-1])
            done, total = int(last["step"]), int(last["max_steps"])
        except (OSError, IndexError, ValueError, KeyError):
            # No line yet, or half of one.
            return
        self._progress.advance(done - (self._done or 0))
        if self._done is None:
            # After the steps of a checkpoint, which have no part in the rate.
            self._progress.expect(total)
            self._progress.start("training", counted=True)
        self._done = done


def _follow_parent() -> None:
    os.environ[DIE_WITH_PARENT] = "1"
    die_with_parent()

"""Recipes as child processes: started together, watched through their progress files, never left behind."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rewarded_lines.errors import fail
from rewarded_lines.processes import DIE_WITH_PARENT, die_with_parent
from rewarded_lines.progress import Progress

_POLL_SECONDS = 0.2
_LINES_SHOWN = 12


@dataclass(frozen=True)
class Job:
    """A command, the file its output goes to, and the file in which it tells how far it is."""

    name: str
    command: tuple[str, ...]
    log: Path
    progress: Path


# Called with the name of a part of a stage that begins; the part's steps are told to what it returns.
Watch = Callable[[str], Progress]


def run_jobs(jobs: Sequence[Job], watch: Watch) -> None:
    """Run `jobs` at the same time, the cores shared out among them, and wait for all.

    Args:
        jobs: what to run.
        watch: called with each job's name.

    Raises:
        UserError: a job failed; the others are stopped, and the message ends with the last lines of its log.
    """
    threads = max(1, len(os.sched_getaffinity(0)) // len(jobs))
    running: dict[Job, subprocess.Popen[bytes]] = {}
    watched = {job: _Watched(job.progress, watch(job.name)) for job in jobs}
    try:
        for job in jobs:
            running[job] = _start(job, threads)
        while running:
            time.sleep(_POLL_SECONDS)
            for job, process in list(running.items()):
                watched[job].look()
                code = process.poll()
                if code is not None:
                    del running[job]
                    _check(job, code)
    finally:
        for process in running.values():
            process.kill()
            process.wait()


def _start(job: Job, threads: int) -> subprocess.Popen[bytes]:
    job.log.parent.mkdir(parents=True, exist_ok=True)
    job.progress.unlink(missing_ok=True)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        # Threads that wait by spinning make a step thirty times slower as soon as anything else wants a core.
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
        # The demo asks nobody for anything; who brings configs that name Hub ids says HF_HUB_OFFLINE=0.
        "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1"),
        "REWARDED_LINES_PROGRESS": str(job.progress),
        # The launcher is told by `preexec_fn`; the recipe below it reads the variable.
        DIE_WITH_PARENT: str(os.getpid()),
    }
    with job.log.open("wb") as log:
        return subprocess.Popen(
            job.command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            preexec_fn=_follow_parent,
        )


def _follow_parent() -> None:
    os.environ[DIE_WITH_PARENT] = "1"
    die_with_parent()


class _Watched:
    """The steps of a running recipe, which its progress file tells."""

    def __init__(self, file: Path, progress: Progress) -> None:
        self._file, self._progress = file, progress
        self._done: int | None = None
        progress.start("starting")

    def look(self) -> None:
        """Tell the steps that are new."""
        try:
            last = json.loads(self._file.read_text(encoding="utf-8").splitlines()[-1])
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


def _check(job: Job, code: int) -> None:
    if code == 0:
        return
    lines = job.log.read_text(encoding="utf-8", errors="replace").splitlines()
    raise fail(
        f"the stage failed with exit code {code}",
        where=job.name,
        got="\n    ".join(["the last lines of its log:", *lines[-_LINES_SHOWN:]]),
        remedy=f"the whole log is {job.log}; start the demo again to go on from here",
    )

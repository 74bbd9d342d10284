"""Whole processes, measured from outside: wall time, peak resident memory, bytes that read calls returned."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

_READ = 1 << 24


@dataclass(frozen=True)
class Run:
    """One process, or several one after another: times and bytes read add up, the peak is the highest.

    `processor` is the time that all cores together worked for it. A busy machine or a slow disk does not add to it.
    """

    seconds: float
    peak: int
    read: int
    processor: float = 0.0


@dataclass(frozen=True)
class Competitor:
    """Commands to be timed, each with the output to remove after it, and the folders they read."""

    name: str
    commands: Sequence[tuple[Sequence[str | Path], Path]]
    inputs: Sequence[Path]


class CommandFailed(Exception):
    """A measured command did not succeed; the text is what it said."""


def run_once(command: Sequence[str | Path], environment: dict[str, str]) -> Run:
    """Run a command to its end and measure it, from a small process between: this file, run as a script.

    Linux counts the memory that a process had before `exec` as its own, so a command started from here would be
    charged with what this process once held.
    """
    launcher = [sys.executable, "-S", __file__, *map(str, command)]
    done = subprocess.run(launcher, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise CommandFailed(f"{' '.join(map(str, command))}\n{done.stderr}")
    return Run(**json.loads(done.stdout))


def alternate(competitors: Sequence[Competitor], repeats: int, environment: dict[str, str]) -> dict[str, list[Run]]:
    """Run every competitor once in each round, in turning order, its inputs in the page cache, the disk at rest."""
    runs: dict[str, list[Run]] = {competitor.name: [] for competitor in competitors}
    for round_ in range(repeats):
        for competitor in competitors if round_ % 2 == 0 else reversed(competitors):
            parts = []
            for command, out in competitor.commands:
                clear(out)
                warm(competitor.inputs)
                parts.append(run_once(command, environment))
                clear(out)
            read, processor = sum(p.read for p in parts), sum(p.processor for p in parts)
            total = Run(sum(p.seconds for p in parts), max(p.peak for p in parts), read, processor)
            runs[competitor.name].append(total)
    return runs


def middle(runs: Sequence[Run]) -> Run:
    """Return the median of each figure."""
    return Run(
        median(run.seconds for run in runs),
        int(median(run.peak for run in runs)),
        int(median(run.read for run in runs)),
        median(run.processor for run in runs),
    )


def clear(out: Path) -> None:
    """Remove an output and wait until the disk has nothing left to write."""
    shutil.rmtree(out, ignore_errors=True)
    os.sync()


def warm(folders: Sequence[Path]) -> None:
    """Read every file, so that it lies in the page cache."""
    buffer = bytearray(_READ)
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                with open(path, "rb", buffering=0) as file:
                    while file.readinto(buffer):
                        pass


def markdown(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table with even columns."""
    cells = [heading, *rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [f"| {' | '.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))} |" for line in cells]
    return "\n".join([lines[0], "|-" + "-|-".join("-" * width for width in widths) + "-|", *lines[1:]])


def folder_bytes(folder: Path) -> int:
    """Return how many bytes the files below a folder hold."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _launch(command: Sequence[str]) -> Run:
    """Run a command as this process's child, and take what the kernel counted before it is reaped.

    `rchar` counts what read calls returned, from the page cache or not; pages of mapped files are not in it.
    """
    with tempfile.TemporaryFile() as said:
        begin = time.perf_counter()
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=said, stderr=said)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        seconds = time.perf_counter() - begin
        counters = dict(line.split(": ") for line in Path(f"/proc/{process.pid}/io").read_text().splitlines())
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            text = said.read().decode(errors="replace")[-3000:]
            raise SystemExit(f"failed with code {process.returncode}:\n{text}")
    return Run(seconds, usage.ru_maxrss * 1024, int(counters["rchar"]), usage.ru_utime + usage.ru_stime)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(asdict(_launch(sys.argv[1:]))))

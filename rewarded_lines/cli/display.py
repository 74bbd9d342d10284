"""What commands show: results on stdout; on stderr a progress bar, or in a log a line each minute.

Short work shows no bar.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from datetime import timedelta
from time import monotonic
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console, Group, RenderableType
from rich.filesize import decimal
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from rewarded_lines.progress import Progress

if TYPE_CHECKING:
    from rewarded_lines.evaluator.records import Run

# Seconds.
PATIENCE = 2.0
SECONDS_BETWEEN_LINES = 60.0
_REFRESHES_A_SECOND = 5
_WIDE, _RIGHT = {"ratio": 1}, {"justify": "right"}


def show_json(content: Any) -> None:
    """Print a command's result as JSON; other characters than ASCII are escaped where stdout cannot print them."""
    escaped = (sys.stdout.encoding or "").lower().replace("-", "") != "utf8"
    typer.echo(json.dumps(content, indent=2, ensure_ascii=escaped))


def show_line(text: str) -> None:
    """Print a path, an address or a command without folding it, so that it can be copied."""
    Console(highlight=False).print(Text(text), soft_wrap=True)


@contextmanager
def progress_bar(title: str, *, quiet: bool = False, unit: str = "step") -> Iterator[Progress]:
    """Show a `Progress` with its rate and the time left; within the block, stdout goes to stderr.

    `unit` is what is counted, in the singular; "byte" shows sizes.
    """
    console, over = Console(stderr=True), threading.Event()
    work = Work(title, unit, None if quiet else console)
    live = Live(work, console=console, transient=True, refresh_per_second=_REFRESHES_A_SECOND)

    def show() -> None:
        if console.is_terminal:
            if not over.wait(PATIENCE):
                live.start()
            return
        while not over.wait(SECONDS_BETWEEN_LINES):
            console.print(work.line(), markup=False, emoji=False, highlight=False, soft_wrap=True)

    # A thread, because the first step may take long before it reports.
    thread = threading.Thread(target=show, daemon=True)
    with stdout_for_results():
        if not quiet:
            thread.start()
        try:
            yield work
        finally:
            over.set()
            if not quiet:
                thread.join()
            live.stop()


def tell_rows(header: Mapping[str, Any], quiet: bool) -> None:
    """Print on stderr a run's notes: on its prompts, its rewards and its engine."""
    # Earlier versions kept them with the prompts.
    for sentence in () if quiet else header.get("told", header["prompts"].get("told", ())):
        typer.echo(sentence, err=True)


def tell_missing(run: Run, quiet: bool) -> None:
    """Print on stderr how many responses of a run have no score, a line for each reward that lacks some."""
    from rewarded_lines.evaluator.missing_scores import missing_lines

    for line in () if quiet else missing_lines(run.missing):
        typer.echo(line, err=True)


@contextmanager
def stdout_for_results() -> Iterator[None]:
    """Send to stderr what Python, C libraries and child processes print to stdout in the block."""
    kept = None
    with suppress(OSError):
        sys.stdout.flush()
        kept = os.dup(1)
        os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        if kept is not None:
            os.dup2(kept, 1)
            os.close(kept)


class Work(Progress):
    """The progress of some work, and its look; the rate is that of counted steps alone."""

    def __init__(self, title: str, unit: str, console: Console | None = None) -> None:
        """Start the clock; see `progress_bar`. Facts are printed on `console`, if there is one."""
        self._title, self._unit, self._console = title, unit, console
        self._lock = threading.Lock()
        self._spinner = Spinner("dots")
        self._step, self._began, self._counted = "starting", monotonic(), False
        self._total = self._done = self._made = 0
        # Seconds of the counted steps: before this step, and at the last `advance`.
        self._before = self._until = 0.0

    def tell(self, fact: str) -> None:
        """Print a fact above the bar."""
        if self._console is not None:
            self._console.print(Text(f"{self._title}: {fact}"), soft_wrap=True)

    def expect(self, total: int) -> None:
        """Set the total."""
        self._total = total

    def start(self, step: str, counted: bool = False) -> None:
        """Show this step."""
        with self._lock:
            self._before = self._seconds()
            self._step, self._began, self._counted = step, monotonic(), counted

    def advance(self, count: int, name: str = "") -> None:
        """Add to what is done."""
        with self._lock:
            self._done += count
            if self._counted:
                self._made, self._until = self._made + count, self._seconds()

    def rate(self) -> float | None:
        """Return how much is done per second, or None while it is unknown."""
        return self._made / self._until if self._made and self._until > 0 else None

    def left(self) -> float | None:
        """Return the seconds left at this rate."""
        rate = self.rate()
        return rate and max(0.0, (self._total - self._done) / rate - (self._seconds() - self._until))

    def line(self) -> str:
        """Return title, count, rate, time left and step as plain text."""
        with self._lock:
            cells = f"{', '.join(self._cells())}; " if self._total else ""
            return f"{self._title}: {cells}{self._step} {_clock(monotonic() - self._began)}"

    def __rich__(self) -> RenderableType:
        """Return a line with the step, and a bar above it if there is a total."""
        with self._lock:
            # A bar shows the title itself.
            named = Text(self._step if self._total else f"{self._title}: {self._step}")
            since = Text(_clock(monotonic() - self._began), style="dim")
            step = _row((self._spinner, {"width": 1}), (named, {**_WIDE, "overflow": "ellipsis"}), (since, _RIGHT))
            if not self._total:
                return step
            bar = ProgressBar(total=self._total, completed=min(self._done, self._total))
            cells = [Text(text, style) for text, style in zip(self._cells(), ("bold", "", "cyan"), strict=False)]
            return Group(_row((Text(self._title), {}), (bar, _WIDE), *((cell, _RIGHT) for cell in cells)), step)

    def _cells(self) -> list[str]:
        """Return the count and, once known, the rate and the time left."""
        rate, left = self.rate(), self.left()
        if self._unit == "byte":
            count, pace = f"{decimal(self._done)}/{decimal(self._total)}", f"{decimal(round(rate or 0))}/s"
        else:
            count = f"{self._done:,}/{self._total:,} {self._unit}s"
            pace = f"{rate:,.1f}/s" if rate and rate >= 1 else f"{1 / (rate or 1):,.1f} s each"
        return [count] if left is None else [count, pace, f"{_clock(left)} left"]

    def _seconds(self) -> float:
        """Return the seconds of counted steps so far."""
        return self._before + (monotonic() - self._began if self._counted else 0.0)


def quiet_libraries() -> None:
    """Turn off the bars and notices of torch and transformers."""
    # torch reads this at its import, which the next line causes.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _row(*cells: tuple[RenderableType, Mapping[str, Any]]) -> Table:
    """Return cells side by side, each with the arguments of its `Table.add_column`."""
    row = Table.grid(padding=(0, 1), expand=True)
    for _, look in cells:
        row.add_column(no_wrap=True, **look)
    row.add_row(*(cell for cell, _ in cells))
    return row


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=int(seconds)))

"""What commands show: results on stdout, and on stderr a bar while they work, or a line each minute in a log.

The bar of work that is over at once is not shown.
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
from typing import Any

import typer
from rich.console import Console, Group, RenderableType
from rich.filesize import decimal
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from rewarded_lines.progress import Progress

# Seconds.
PATIENCE = 2.0
SECONDS_BETWEEN_LINES = 60.0
_REFRESHES_A_SECOND = 5
_WIDE, _RIGHT = {"ratio": 1}, {"justify": "right"}


def show_json(content: Any) -> None:
    """Print a command's result as JSON."""
    typer.echo(json.dumps(content, indent=2, ensure_ascii=False))


def show_line(text: str) -> None:
    """Print a path, an address or a command on one line, however long it is: it is for copying."""
    Console(highlight=False).print(Text(text), soft_wrap=True)


@contextmanager
def progress_bar(title: str, *, quiet: bool = False, unit: str = "step") -> Iterator[Progress]:
    """Yield a `Progress` that is shown with the rate and the time left.

    Until the block ends, stdout leads to stderr: what libraries and users' functions print is not a result.

    Args:
        title: what is being done.
        quiet: show nothing.
        unit: what is counted, in the singular; "byte" shows sizes.
    """
    console, work, over = Console(stderr=True), Work(title, unit), threading.Event()
    live = Live(work, console=console, transient=True, refresh_per_second=_REFRESHES_A_SECOND)

    def show() -> None:
        if console.is_terminal:
            if not over.wait(PATIENCE):
                live.start()
            return
        while not over.wait(SECONDS_BETWEEN_LINES):
            console.print(work.line(), markup=False, emoji=False, highlight=False, soft_wrap=True)

    # In a thread, because the first step may take long before it tells anything.
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
    """Say on stderr how a run's prompts were read, which were left out, and what rewards do not read of them."""
    for sentence in () if quiet else header["prompts"].get("told", ()):
        typer.echo(sentence, err=True)


@contextmanager
def stdout_for_results() -> Iterator[None]:
    """Send all that is printed in the block to stderr, by Python, by C libraries and by child processes."""
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
    """How far some work is, and how that looks.

    The rate is that of counted steps: the seconds of steps that prepare, and what was there before, have no part in it.
    """

    def __init__(self, title: str, unit: str) -> None:
        """Begin now; see `progress_bar`."""
        self._title, self._unit = title, unit
        self._lock = threading.Lock()
        self._spinner = Spinner("dots")
        self._step, self._began, self._counted = "starting", monotonic(), False
        self._total = self._done = self._made = 0
        # Seconds of the counted steps before this one, and of all of them when something was finished last.
        self._before = self._until = 0.0

    def expect(self, total: int) -> None:
        """Take note of how much there is in all."""
        self._total = total

    def start(self, step: str, counted: bool = False) -> None:
        """Show this step from now on."""
        with self._lock:
            self._before = self._seconds()
            self._step, self._began, self._counted = step, monotonic(), counted

    def advance(self, count: int, name: str = "") -> None:
        """Add what is done."""
        with self._lock:
            self._done += count
            if self._counted:
                self._made, self._until = self._made + count, self._seconds()

    def rate(self) -> float | None:
        """Return how much is finished in a second; None as long as that is not known."""
        return self._made / self._until if self._made and self._until > 0 else None

    def left(self) -> float | None:
        """Return the seconds that are left at this rate."""
        rate = self.rate()
        return rate and max(0.0, (self._total - self._done) / rate - (self._seconds() - self._until))

    def line(self) -> str:
        """Return title, count, rate, time left and step as plain text."""
        with self._lock:
            cells = f"{', '.join(self._cells())}; " if self._total else ""
            return f"{self._title}: {cells}{self._step} {_clock(monotonic() - self._began)}"

    def __rich__(self) -> RenderableType:
        """Return a line with the step, below a bar where something is counted."""
        with self._lock:
            # Where there is a bar, it has the title.
            named = Text(self._step if self._total else f"{self._title}: {self._step}")
            since = Text(_clock(monotonic() - self._began), style="dim")
            step = _row((self._spinner, {"width": 1}), (named, {**_WIDE, "overflow": "ellipsis"}), (since, _RIGHT))
            if not self._total:
                return step
            bar = ProgressBar(total=self._total, completed=min(self._done, self._total))
            cells = [Text(text, style) for text, style in zip(self._cells(), ("bold", "", "cyan"), strict=False)]
            return Group(_row((Text(self._title), {}), (bar, _WIDE), *((cell, _RIGHT) for cell in cells)), step)

    def _cells(self) -> list[str]:
        """Return the count and, once they are known, the rate and the time left."""
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
    """Turn off the bars and notices of the libraries below, so that ours is the only voice on the terminal."""
    # Set before the next line imports torch, which reads it then.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _row(*cells: tuple[RenderableType, Mapping[str, Any]]) -> Table:
    """Return cells side by side, each with what `Table.add_column` takes."""
    row = Table.grid(padding=(0, 1), expand=True)
    for _, look in cells:
        row.add_column(no_wrap=True, **look)
    row.add_row(*(cell for cell, _ in cells))
    return row


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=int(seconds)))

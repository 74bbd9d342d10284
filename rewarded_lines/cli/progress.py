"""What the command line shows while it works, on stderr: a bar on a terminal, elsewhere (a log, a cluster's output) a
line each minute. Work that is over at once shows nothing.

The verbs tell it through one function, `progress(name, done, total)`. With `done` above 0 something counted is
finished; with 0 it is only begun, and a total of 0 says that it prepares what is counted and is not part of it.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from datetime import timedelta
from time import monotonic
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.filesize import decimal
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

Advance = Callable[[str, int, int], None]
# The bar of work that is over sooner is not shown.
PATIENCE = 2.0
# Where there is no terminal.
SECONDS_BETWEEN_LINES = 60.0
_REFRESHES_A_SECOND = 5


@contextmanager
def progress_bar(title: str, *, quiet: bool = False, unit: str = "step") -> Iterator[Advance]:
    """Yield `advance(name, done, total)`, which shows what is done, what is being done, the rate and the time left.

    Until the block ends stdout leads to stderr: what libraries and users' functions print is no result.

    Args:
        title: what is being done.
        quiet: show nothing.
        unit: what is counted, one of it; "byte" shows sizes.
    """
    console = Console(stderr=True)
    work = Work(title, unit)
    shown = nullcontext() if quiet else _live(work, console) if console.is_terminal else _logged(work, console)
    with stdout_for_results(), shown:
        yield work.advance


def tell_rows(header: Mapping[str, Any], quiet: bool) -> None:
    """Say on stderr how a run's prompts were read, which were left out, and what rewards do not read of them."""
    for sentence in () if quiet else header["prompts"].get("told", ()):
        sys.stderr.write(f"{sentence}\n")


@contextmanager
def _live(work: Work, console: Console) -> Iterator[None]:
    """Show a bar that goes away at the end."""
    live = Live(work, console=console, transient=True, refresh_per_second=_REFRESHES_A_SECOND)
    # A thread of its own: the first stage may take long and tell nothing meanwhile.
    timer = threading.Timer(PATIENCE, live.start)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
        live.stop()


@contextmanager
def _logged(work: Work, console: Console) -> Iterator[None]:
    """Print a line from time to time."""
    over = threading.Event()

    def print_lines() -> None:
        while not over.wait(SECONDS_BETWEEN_LINES):
            console.print(work.line(), markup=False, emoji=False, highlight=False, soft_wrap=True)

    thread = threading.Thread(target=print_lines, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@contextmanager
def stdout_for_results() -> Iterator[None]:
    """Let all that is printed in the block go to stderr, by Python and by what is not Python, children included."""
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


class Work:
    """How far some work is, and how it looks."""

    def __init__(self, title: str, unit: str) -> None:
        """Begin now.

        Args:
            title: what is being done.
            unit: what is counted, one of it; "byte" shows sizes.
        """
        self._title, self._unit = title, unit
        self._lock = threading.Lock()
        self._spinner = Spinner("dots")
        self._stage, self._stage_began = "", monotonic()
        self._done = self._total = 0
        # What was finished in how many seconds of work that counts: what was there before has no part in the rate.
        self._made, self._seconds = 0, 0.0
        # Seconds of such work since something was finished last, up to the news before this.
        self._open, self._counting, self._news = 0.0, False, monotonic()

    def advance(self, name: str, done: int, total: int) -> None:
        """Take note of what is begun or finished; any thread may call this.

        Args:
            name: of it.
            done: how much of what is counted it has finished; 0 where it begins.
            total: how much there is in all; 0 where what begins only prepares.
        """
        now = monotonic()
        with self._lock:
            if self._counting:
                self._open += now - self._news
                if done:
                    self._made, self._seconds, self._open = self._made + done, self._seconds + self._open, 0.0
            self._news = now
            self._done += done
            self._total = total or self._total
            if not done:
                self._counting = total > 0
                self._stage, self._stage_began = name, now

    def rate(self) -> float | None:
        """Return how much is finished in a second, preparations apart; None as long as that is not known."""
        return self._made / self._seconds if self._made and self._seconds > 0 else None

    def left(self) -> float | None:
        """Return the seconds that are left at this rate."""
        rate = self.rate()
        if rate is None:
            return None
        since = self._open + (monotonic() - self._news if self._counting else 0.0)
        return max(0.0, (self._total - self._done) / rate - since)

    def __rich__(self) -> RenderableType:
        """Return a line with the stage, below a bar where something is counted."""
        with self._lock:
            stage = Table.grid(padding=(0, 1), expand=True)
            stage.add_column(width=1)
            stage.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
            stage.add_column(justify="right", no_wrap=True)
            # The bar has the title.
            named = self._stage or "starting" if self._total else f"{self._title}: {self._stage or 'starting'}"
            stage.add_row(self._spinner, Text(named), Text(_clock(monotonic() - self._stage_began), style="dim"))
            return Group(self._bar(), stage) if self._total else stage

    def line(self) -> str:
        """Return the same as plain text."""
        with self._lock:
            cells = [self._count(), *self._pace()] if self._total else []
            stage = f"{self._stage or 'starting'} {_clock(monotonic() - self._stage_began)}"
            return f"{self._title}: {'; '.join([', '.join(cells), stage] if cells else [stage])}"

    def _pace(self) -> list[str]:
        rate, left = self.rate(), self.left()
        return [] if rate is None or left is None else [self._rate_text(rate), f"{_clock(left)} left"]

    def _bar(self) -> Table:
        bar = Table.grid(padding=(0, 1), expand=True)
        bar.add_column(no_wrap=True)
        bar.add_column(ratio=1)
        styles = ("bold", "", "cyan")
        cells = [Text(text, style) for text, style in zip((self._count(), *self._pace()), styles, strict=False)]
        for _ in cells:
            bar.add_column(justify="right", no_wrap=True)
        bar.add_row(Text(self._title), ProgressBar(total=self._total, completed=min(self._done, self._total)), *cells)
        return bar

    def _count(self) -> str:
        if self._unit == "byte":
            return f"{decimal(self._done)}/{decimal(self._total)}"
        return f"{self._done:,}/{self._total:,} {self._unit}s"

    def _rate_text(self, rate: float) -> str:
        if self._unit == "byte":
            return f"{decimal(round(rate))}/s"
        return f"{rate:,.1f}/s" if rate >= 1 else f"{1 / rate:,.1f} s each"


def quiet_libraries() -> None:
    """Turn off the bars and notices of the libraries below, so that ours is the only voice on the terminal."""
    # Read when torch is loaded, which the next line does.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=int(seconds)))

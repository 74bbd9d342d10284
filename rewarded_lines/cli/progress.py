"""The one progress bar of the command line: rate and time left, on stderr, silent when nobody watches."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

Advance = Callable[[int, int], None]


@contextmanager
def progress_bar(title: str, *, quiet: bool = False, unit: str = "steps", after: float = 0.0) -> Iterator[Advance]:
    """Yield `advance(done, total)`, which moves a bar on by `done` out of `total`.

    Args:
        title: what is being done.
        quiet: show nothing; a stderr that is no terminal shows nothing either.
        unit: "bytes" to show sizes, anything else to show counts.
        after: seconds that must pass before the bar appears, so that short work shows none.
    """
    console = Console(stderr=True)
    counter: ProgressColumn = DownloadColumn() if unit == "bytes" else MofNCompleteColumn()
    columns = (TextColumn("{task.description}"), BarColumn(), counter, TimeElapsedColumn(), TimeRemainingColumn())
    bars = Progress(*columns, console=console, disable=quiet or not console.is_terminal)
    task, begun = bars.add_task(title, total=None), monotonic()
    if not after:
        bars.start()

    def advance(done: int, total: int) -> None:
        if not bars.live.is_started and monotonic() - begun > after:
            bars.start()
        bars.update(task, advance=done, total=total)

    try:
        yield advance
    finally:
        if bars.live.is_started:
            bars.stop()


def quiet_libraries() -> None:
    """Turn off the bars and notices of the libraries below, so that ours is the only voice on the terminal."""
    # Read when torch is loaded, which the next line does.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()

"""Traces: what a run does when, in the JSON format of chrome://tracing and ui.perfetto.dev.

The format is the "JSON Array Format" of Chrome's trace viewer, in which the closing bracket may be missing. So each
line is written as its work ends, and the trace of a killed run can be read.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

from rewarded_lines.errors import fail
from rewarded_lines.progress import SILENT, Progress

Result = TypeVar("Result")
_HEAD = '[\n{"name":"process_name"'


class _Trace:
    """An open file of one process. Times are in microseconds since its start."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w", encoding="utf-8", buffering=1)
        self._lock, self._began = threading.Lock(), time.perf_counter()
        self._file.write("[\n")
        self.write("process_name", "M", {"name": "rewarded-lines"})

    def now(self) -> float:
        return (time.perf_counter() - self._began) * 1e6

    def write(self, name: str, phase: str, details: dict[str, Any], **more: float) -> None:
        event = {"name": name, "ph": phase, "pid": os.getpid(), "tid": threading.get_native_id(), **more}
        line = json.dumps({**event, "args": details}, separators=(",", ":")) + ",\n"
        with self._lock:
            self._file.write(line)

    def close(self) -> None:
        self._file.close()


_open: _Trace | None = None


@contextmanager
def span(name: str, **details: Any) -> Iterator[None]:
    """Record the block in the trace, if one is written; spans of a thread may lie in each other."""
    trace = _open
    if trace is None:
        yield
        return
    began = trace.now()
    try:
        yield
    finally:
        trace.write(name, "X", details, ts=began, dur=trace.now() - began)


class _Steps(Progress):
    """Passes everything on, and records each step until the next one of its thread."""

    def __init__(self, shown: Progress, trace: _Trace) -> None:
        self._shown, self._trace = shown, trace
        self._running: dict[int, tuple[str, float]] = {}

    def tell(self, fact: str) -> None:
        self._shown.tell(fact)

    def expect(self, total: int) -> None:
        self._shown.expect(total)

    def start(self, step: str, counted: bool = False) -> None:
        self.end()
        self._running[threading.get_ident()] = step, self._trace.now()
        self._shown.start(step, counted)

    def advance(self, count: int, name: str = "") -> None:
        self._shown.advance(count, name)

    def end(self) -> None:
        """Record this thread's step as ended."""
        step, began = self._running.pop(threading.get_ident(), ("", 0.0))
        if step:
            self._trace.write(step, "X", {}, ts=began, dur=self._trace.now() - began)


@contextmanager
def recording(path: str | Path | None, progress: Progress = SILENT) -> Iterator[Progress]:
    """Write a trace of the block, of the steps that are reported and of each `span`.

    Args:
        path: the file; without one the block runs as it is. An earlier trace is replaced, no other file.
        progress: what is reported is shown there, too.

    Yields:
        The progress to report to.

    Raises:
        UserError: the file cannot be written, or is no trace.
    """
    global _open
    if path is None or _open is not None:
        yield progress
        return
    _open = trace = _opened(Path(path))
    steps = _Steps(progress, trace)
    try:
        yield steps
    finally:
        steps.end()
        _open = None
        trace.close()


def _opened(path: Path) -> _Trace:
    try:
        if path.exists() and path.read_bytes()[: len(_HEAD)] != _HEAD.encode():
            raise fail("the file exists and is no trace", where=str(path), remedy="name another --trace")
        return _Trace(path)
    except OSError as error:
        raise fail("cannot be written", where=str(path), got=str(error), remedy="name another --trace") from error


def traced(verb: Callable[..., Result]) -> Callable[..., Result]:
    """Let a verb with `options` and `progress` write the trace that `options.trace` names."""

    @wraps(verb)
    def call(*args: Any, options: Any, progress: Progress = SILENT, **given: Any) -> Result:
        with recording(options.trace, progress) as seen:
            return verb(*args, options=options, progress=seen, **given)

    return call

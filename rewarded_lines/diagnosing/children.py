"""Questions to a Python of its own: what is asked may crash, hang, or print what it likes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_LONGEST = 160
# Where the child writes its answer: stdout belongs to the libraries.
_ANSWER = "REWARDED_LINES_ANSWER"
_PROLOGUE = f"""
import json, os
def answer(**told):
    with open(os.environ[{_ANSWER!r}], "w", encoding="utf-8") as file:
        json.dump(told, file)
"""


@dataclass(frozen=True)
class Reply:
    """What came of a question.

    Attributes:
        told: the answer, empty where there is none.
        failure: why there is none, in a line.
    """

    told: dict[str, Any] = field(default_factory=dict)
    failure: str = ""


def ask(code: str, seconds: float, environment: Mapping[str, str] | None = None) -> Reply:
    """Run Python code in a child that may call `answer(name=value, ...)` once.

    Args:
        code: to run. The current folder is not on its path: a `torch.py` there is not torch.
        seconds: after which the child and its own children are ended.
        environment: beside what is set already.
    """
    with tempfile.NamedTemporaryFile(prefix="rewarded-lines-") as file, tempfile.TemporaryFile() as said:
        child = subprocess.Popen(
            [sys.executable, "-P", "-c", _PROLOGUE + code],
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            env={**os.environ, **(environment or {}), _ANSWER: file.name},
            start_new_session=True,
        )
        try:
            status = child.wait(seconds)
        except subprocess.TimeoutExpired:
            return Reply(failure=f"no answer in {seconds:g} s")
        finally:
            _end(child)
        try:
            return Reply(told=json.loads(file.read().decode("utf-8")))
        except ValueError:
            said.seek(0)
            return Reply(failure=_last_words(said.read().decode("utf-8", "replace"), status))


def _end(child: subprocess.Popen[bytes]) -> None:
    """End the child and all that it has started."""
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    child.wait()


def _last_words(text: str, status: int) -> str:
    """Return the last line of a traceback, or how the process ended."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    # Libraries put their own advice below the error.
    errors = [line for line in lines if line.partition(":")[0].endswith(("Error", "Exception"))]
    last = (errors or lines or [f"exit code {status}"])[-1]
    return last if len(last) <= _LONGEST else f"{last[: _LONGEST - 1]}…"

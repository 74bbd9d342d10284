"""A small process that holds vLLM's server: it passes signals on and leaves no worker behind. It imports nothing heavy.

vLLM alone does not do that: a signal while it starts can hang it, and a killed server leaves its workers.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType

from rewarded_lines.processes import DIE_WITH_PARENT, die_with_parent

# Seconds that vLLM has to end by itself.
PATIENCE = 15.0


def keeping(command: Sequence[str]) -> list[str]:
    """Return the command that holds the server which a command starts."""
    return [sys.executable, "-P", "-m", "rewarded_lines.serving.keep_server", *command]


def keep(command: Sequence[str]) -> int:
    """Run a server until it ends, or until a signal asks for that; return the exit code.

    Its processes are a group of their own. Each ends with the one that started it: see `register` in `vllm_plugin.py`.
    """
    environment = {**os.environ, DIE_WITH_PARENT: str(os.getpid())}
    process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)
    last = float("inf")

    def end(number: int, frame: FrameType | None) -> None:
        nonlocal last
        # A second signal is impatient.
        last = time.monotonic() + (PATIENCE if last == float("inf") else 0)
        process.terminate()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # `nohup` has it ignored.
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, end)
    while process.poll() is None and time.monotonic() < last:
        with suppress(subprocess.TimeoutExpired):
            process.wait(0.2)
    # Also what a server leaves that has ended by itself.
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return 0 if last < float("inf") else process.returncode


if __name__ == "__main__":
    die_with_parent()
    sys.exit(keep(sys.argv[1:]))

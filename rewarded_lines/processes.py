"""Processes and their ends: children that must not outlive their parent, and a termination that cleans up."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

DIE_WITH_PARENT = "REWARDED_LINES_DIE_WITH_PARENT"
_PR_SET_PDEATHSIG = 1
VLLM_SETTINGS = {
    # In this process an engine is built quickly, plans are opened once, and a kill leaves nothing behind.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent dies, if REWARDED_LINES_DIE_WITH_PARENT is set (Linux).

    The variable holds "1", or the pid of an ancestor: this process ends at once if that one has died before the call.
    It is removed from the environment, because the children of this process must not read it.
    """
    asked = os.environ.pop(DIE_WITH_PARENT, "")
    if not asked.isdecimal() or not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent or (int(asked) > 1 and not _alive(int(asked))):
        sys.exit(1)


@contextmanager
def termination_as_exit() -> Iterator[None]:
    """Let SIGTERM end the block as `sys.exit` does, so that half-done work is cleaned up on the way out."""

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        sys.exit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def prepare_vllm() -> None:
    """Keep vLLM in this process: set the environment that it reads when it is imported; a user's own settings stay."""
    for name, value in VLLM_SETTINGS.items():
        os.environ.setdefault(name, value)


def give_back_memory() -> None:
    """Give freed memory back to the system, where the C library can: glibc keeps more with every point of a sweep."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True

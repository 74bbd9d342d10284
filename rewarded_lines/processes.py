"""Child processes that must not outlive their parent."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

DIE_WITH_PARENT = "REWARDED_LINES_DIE_WITH_PARENT"
_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent dies; an ancestor asks for it through the environment.

    `REWARDED_LINES_DIE_WITH_PARENT` holds "1", or the pid of the ancestor that must still be alive: a parent that died
    before this call sends no signal any more. Does nothing without the variable, and nothing outside Linux. The
    variable is taken out of the environment, since it is meant for this process and not for those that it starts.
    """
    asked = os.environ.pop(DIE_WITH_PARENT, "")
    if not asked.isdecimal() or not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent or (int(asked) > 1 and not _alive(int(asked))):
        sys.exit(1)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True

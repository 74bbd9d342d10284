"""Child processes that must not outlive their parent."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

DIE_WITH_PARENT = "REWARDED_LINES_DIE_WITH_PARENT"
_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies, if the parent asks so in the environment.

    Does nothing unless `REWARDED_LINES_DIE_WITH_PARENT=1`, and nothing outside Linux. The variable is taken
    out of the environment, since it is meant for this process only and not for processes that this one
    starts.
    """
    if os.environ.pop(DIE_WITH_PARENT, "") != "1" or not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # A parent that died before the call above sends no signal any more. (Its pid may well be 1, in a
    # container.)
    if os.getppid() != parent:
        sys.exit(1)

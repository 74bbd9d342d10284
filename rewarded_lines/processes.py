"""Processes: children that end with their parent or time, a termination that cleans up, memory, GPUs."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

GIB = 1 << 30
DIE_WITH_PARENT = "REWARDED_LINES_DIE_WITH_PARENT"
_PR_SET_PDEATHSIG = 1
# Here, not where they are called: between fork and exec, to look a function up can wait forever for a lock that another
# thread held at the fork, such as one that imported vLLM.
_LIBC = ctypes.CDLL(None, use_errno=True)
_prctl, _malloc_trim = (getattr(_LIBC, name, None) for name in ("prctl", "malloc_trim"))
# A container's limit, its use, and the name of what can give way; by version 2 and 1 of control groups.
_GROUP_FILES = (
    ("/sys/fs/cgroup/memory.max", "memory.current", "inactive_file"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
VLLM_SETTINGS = {
    # In this process, an engine starts quickly and a kill leaves no other process.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}


def die_with_parent() -> None:
    """Let the kernel kill this process when its parent dies, if REWARDED_LINES_DIE_WITH_PARENT is set (Linux).

    The variable is "1" or the pid of an ancestor; if that ancestor is already dead, this process exits at once. The
    call removes the variable, because children must not read it.
    """
    asked = os.environ.pop(DIE_WITH_PARENT, "")
    if not asked.isdecimal() or _prctl is None:
        return
    parent = os.getppid()
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent or not Path("/proc", asked).exists():
        sys.exit(1)


@contextmanager
def termination_as_exit() -> Iterator[None]:
    """Turn SIGTERM in the block into `sys.exit`, so that `finally` clauses clean up."""

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


def attempt(code: str, seconds: float = 300.0) -> str:
    """Run Python code in a child process; return why it failed in one line, "" if it ended well.

    The child and its own children are killed after some seconds: vLLM needs half a minute on two slow cores. The
    current folder is not on the child's path: a `torch.py` there is not torch.
    """
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        child = subprocess.Popen(
            [sys.executable, "-P", "-c", code],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=os.environ | VLLM_SETTINGS,
            start_new_session=True,
        )
        try:
            status = child.wait(seconds)
        except subprocess.TimeoutExpired:
            return f"no answer in {seconds:g} s"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        output.seek(0)
        lines = [line.strip() for line in output if line.strip()]
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    # Libraries print their own advice below the error.
    errors = [line for line in lines if line.partition(":")[0].endswith(("Error", "Exception"))]
    return (errors or lines or [f"exit code {status}"])[-1][:160] if status else ""


def graphics_driver() -> tuple[list[str], str]:
    """Return the GPUs that the driver lists, by name and memory, and what nvidia-smi says where it fails."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError) as error:
        return [], "" if isinstance(error, FileNotFoundError) else str(error)
    said = [*done.stdout.splitlines(), *done.stderr.splitlines(), f"exit code {done.returncode}"]
    return ([], said[0]) if done.returncode else (done.stdout.splitlines(), "")


def graphics_cards() -> list[str]:
    """Return the GPUs that the driver lists, by name and memory."""
    return graphics_driver()[0]


def available_memory(device: str) -> int:
    """Return the bytes that can be allocated without swapping; on a GPU, with torch's unused reserve."""
    import torch

    if torch.device(device).type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return available_host_memory()


def available_host_memory() -> int:
    """Return the bytes of memory that this machine has available, at most those that its container has left."""
    facts = Path("/proc/meminfo")
    found = re.search(r"MemAvailable: +(\d+)", facts.read_text()) if facts.is_file() else None
    free = int(found[1]) * 1024 if found else os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([free, *(_left_to_container(*names) for names in _GROUP_FILES if Path(names[0]).is_file())])


def _left_to_container(limit: str, used: str, cache: str) -> int:
    """Return a container's limit less what it uses; files in the cache do not count, since they give way."""
    files = (Path(limit), Path(limit).with_name(used), Path(limit).with_name("memory.stat"))
    most, taken, facts = (path.read_text(encoding="ascii").strip() if path.is_file() else "" for path in files)
    if not most.isdecimal():
        return sys.maxsize
    given_way = re.search(rf"^{cache} (\d+)$", facts, re.M)
    return max(0, int(most) - int(taken or 0) + (int(given_way[1]) if given_way else 0))


def give_back_memory() -> None:
    """Return freed memory to the system: glibc keeps more with every point of a sweep."""
    if _malloc_trim:
        _malloc_trim(0)

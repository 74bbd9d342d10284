"""The machine: cores, memory, disks, folders that must take files, GPUs."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from rewarded_lines.diagnosing.findings import Finding

_GB = 10**9
# Below the first nothing of use can be written, below the second a model of a few billion parameters cannot.
_FULL, _LOW = 1 * _GB, 10 * _GB
_LITTLE_MEMORY = 4 * _GB
_SMI_SECONDS = 20.0
_MEMORY_INFO = Path("/proc/meminfo")
_GROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def check_processor() -> Finding:
    """Say how many cores and how much memory this process may use."""
    cores, memory = len(os.sched_getaffinity(0)), _memory()
    found = f"{cores} cores" if memory is None else f"{cores} cores, {memory / _GB:.1f} GB of memory available"
    if memory is not None and memory < _LITTLE_MEMORY:
        remedy = "free -h   # merge streams and needs little, engines and rewards are held in memory"
        return Finding("processor", "warning", found, remedy)
    return Finding("processor", "ok", found)


def check_disks(root: Path) -> Finding:
    """Say how much room there is where things are written.

    Args:
        root: the project's folder.
    """
    places = {"project": root, "Hub cache": hub_folder(), "temporary files": Path(tempfile.gettempdir())}
    free = {name: shutil.disk_usage(_there(path)).free for name, path in places.items()}
    found = ", ".join(f"{size / _GB:.1f} GB for {name}" for name, size in free.items())
    least = min(free, key=lambda name: free[name])
    if free[least] >= _LOW:
        return Finding("disk", "ok", f"{found} free")
    remedy = {
        "project": f"du -sh {root.absolute()}/* | sort -h",
        "Hub cache": "hf cache ls\nexport HF_HOME=/a/larger/disk",
        "temporary files": "export TMPDIR=/a/larger/disk",
    }
    return Finding("disk", "broken" if free[least] < _FULL else "warning", f"{found} free", remedy[least])


def check_caches() -> list[Finding]:
    """Say of every cache folder whether it takes files."""
    return [_check_hub_cache(), _check_temporary(), _check_kernel_cache()]


def hub_folder() -> Path:
    """Return where models of the Hub are kept; the Hub's own client reads the same variables."""
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub")).expanduser()


def check_hub() -> Finding:
    """Say whether the Hub is asked, and whether there is a token; never which."""
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    variable = next((name for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN") if os.environ.get(name)), "")
    file = Path(os.environ.get("HF_TOKEN_PATH") or hub_folder().parent / "token").expanduser()
    token = f"a token in {variable}" if variable else f"a token in {file}" if file.is_file() else "no token"
    if offline:
        return Finding("Hub", "ok", f"HF_HUB_OFFLINE is set: only what is in the cache; {token}")
    return Finding("Hub", "ok", f"models are fetched where needed; {token}")


def graphics_cards() -> list[str]:
    """Return the GPUs that the driver lists, by name and memory; none where there is no driver."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = [tool, "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=_SMI_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]


def _check_hub_cache() -> Finding:
    folder = hub_folder()
    if refusal := _refusal(folder):
        found = f"{folder}: {refusal}; models cannot be fetched"
        return Finding("Hub cache", "broken", found, "export HF_HOME=/a/folder/of/yours")
    return Finding("Hub cache", "ok", str(folder))


def _check_temporary() -> Finding:
    try:
        folder = Path(tempfile.gettempdir())
    except FileNotFoundError as error:
        return Finding("TMPDIR", "broken", str(error), "export TMPDIR=/a/folder/of/yours")
    asked = os.environ.get("TMPDIR")
    if asked and os.path.realpath(asked) != os.path.realpath(folder):
        found = f"{asked} (TMPDIR) takes no files, {folder} is used instead"
        return Finding("TMPDIR", "warning", found, "export TMPDIR=/a/folder/of/yours")
    return Finding("TMPDIR", "ok", str(folder))


def _check_kernel_cache() -> Finding:
    """Look where numba keeps what it has compiled: its own folder, beside the code, or the user's cache."""
    beside = Path(__file__).parents[1] / "streaming" / "__pycache__"
    user = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "numba"
    chosen = os.environ.get("NUMBA_CACHE_DIR")
    places = [Path(chosen)] if chosen else [beside, user]
    for place in places:
        if not _refusal(place):
            return Finding("kernel cache", "ok", str(place))
    found = f"{places[0]}: {_refusal(places[0])}; every merge compiles its kernels anew, some seconds each"
    return Finding("kernel cache", "warning", found, "export NUMBA_CACHE_DIR=/a/folder/of/yours")


def _refusal(folder: Path) -> str:
    """Return why no file can be made in a folder, or in the nearest above it that is there; "" if one can."""
    try:
        with tempfile.TemporaryFile(dir=_there(folder)):
            return ""
    except OSError as error:
        return error.strerror or type(error).__name__


def _there(path: Path) -> Path:
    """Return the path, or the nearest above it that exists."""
    path = path.absolute()
    return next(place for place in (path, *path.parents) if place.exists())


def _memory() -> int | None:
    """Return the bytes that could be taken without swapping, a container's limit considered."""
    known = []
    if _MEMORY_INFO.is_file():
        lines = dict(line.split(":", 1) for line in _MEMORY_INFO.read_text(encoding="ascii").splitlines())
        known.append(int(lines["MemAvailable"].split()[0]) * 1024)
    for path in _GROUP_LIMITS:
        if path.is_file() and (limit := path.read_text(encoding="ascii").strip()).isdecimal():
            known.append(int(limit))
    return min(known, default=None)

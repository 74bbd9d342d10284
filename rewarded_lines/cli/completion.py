"""What a shell offers when a value is half typed: names of methods and engines, run folders, and what runs hold.

A key is pressed and an answer is waited for, so nothing here imports more than the standard library, opens more than
a run's `run.json`, or fails.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import typer

from rewarded_lines.rules.methods import METHODS

_RUN_FILE = "run.json"
# Folders looked into for runs, below the one that is half typed.
_MOST_FOLDERS = 2000
_DEPTH = 3


def offer(*words: str) -> Callable[[str], list[str]]:
    """Return a completion that offers those of the words that begin as what is typed."""

    def begun(incomplete: str) -> list[str]:
        return [word for word in words if word.startswith(incomplete)]

    return begun


engines = offer("vllm", "hf")
devices = offer("auto", "cpu", "cuda")
outsides = offer("alpha", "depth")
kinds = offer("auto", "full", "adapter")
dtypes = offer("auto", "float32", "bfloat16", "float16")
algorithms = offer("ppo", "dpo", "rloo")
stages = offer("data", "sft", "reward", "policies", "sweep", "report", "merge")


def merge_methods(incomplete: str) -> list[tuple[str, str]]:
    """Return the merge methods that begin so, with what each is."""
    return [(name, row.summary) for name, row in METHODS.items() if name.startswith(incomplete)]


def run_folders(incomplete: str) -> list[str]:
    """Return run folders below the folder that is half typed; a shell offers files where there are none."""
    start, begun = os.path.split(incomplete)
    found = []
    for folder in _folders(Path(start or "."), begun):
        if (folder / _RUN_FILE).is_file():
            found.append(os.path.join(start, os.path.relpath(folder, start or ".")))
    return sorted(found)


def run_methods(ctx: typer.Context, incomplete: str) -> list[str]:
    """Return the methods of the run that stands before on the command line."""
    points = _header(ctx).get("points", [])
    names = [entry.get("method", "") for entry in points if isinstance(entry, dict)] if isinstance(points, list) else []
    return [name for name in dict.fromkeys(names) if name and name != "sft" and name.startswith(incomplete)]


def run_rewards(ctx: typer.Context, incomplete: str) -> list[str]:
    """Return the rewards of the run that stands before on the command line, audits apart."""
    rewards = _header(ctx).get("rewards", {})
    known = rewards.items() if isinstance(rewards, dict) else ()
    wanted = [name for name, spec in known if isinstance(spec, dict) and spec.get("role") != "audit"]
    return [name for name in wanted if name.startswith(incomplete)]


def run_minima(ctx: typer.Context, incomplete: str) -> list[str]:
    """Return the beginnings of NAME=VALUE for the rewards of the run."""
    return [] if "=" in incomplete else [f"{name}=" for name in run_rewards(ctx, incomplete)]


def _folders(start: Path, begun: str) -> Iterator[Path]:
    """Yield the folders whose first part begins so, those near first, as many as a key press may cost."""
    level: Sequence[Path] = [start]
    left = _MOST_FOLDERS
    for depth in range(_DEPTH):
        following: list[Path] = []
        for folder in level:
            for path in _inside(folder):
                if (depth == 0 and not path.name.startswith(begun)) or (not begun and path.name.startswith(".")):
                    continue
                left -= 1
                if left < 0:
                    return
                following.append(path)
                yield path
        level = following


def _inside(folder: Path) -> list[Path]:
    try:
        return sorted(Path(entry.path) for entry in os.scandir(folder) if entry.is_dir())
    except OSError:
        return []


def _header(ctx: typer.Context) -> dict[str, Any]:
    """Return what the run says of itself whose folder is typed, {} where there is none."""
    # Before an option that lacks its value, arguments are not told from one another yet.
    for typed in (ctx.params.get("run"), *ctx.args):
        try:
            content = json.loads((Path(str(typed)) / _RUN_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(content, dict):
            return content
    return {}

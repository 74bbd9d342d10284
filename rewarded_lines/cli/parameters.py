"""Parameters that several commands share, and the words that a shell offers when a value is half typed.

A shell waits for completions with each key press: they open no more than a run's `run.json`, and never fail.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import Field
from pathlib import Path
from typing import Annotated, Any

import typer

from rewarded_lines.evaluation.sweep_options import takes_sweep_options
from rewarded_lines.rules.methods import METHODS

_RUN_FILE = "run.json"
# Folders looked into for runs, below the one that is half typed.
_MOST_FOLDERS = 2000
_DEPTH = 3


def offer(*words: str) -> Callable[[str], list[str]]:
    """Return a completion that offers those of the words that begin as what is typed."""
    return lambda incomplete: [word for word in words if word.startswith(incomplete)]


engines = offer("vllm", "hf")
outsides = offer("alpha", "depth")
kinds = offer("auto", "full", "adapter")
dtypes = offer("auto", "float32", "bfloat16", "float16")


def merge_methods(incomplete: str) -> list[tuple[str, str]]:
    """Return the merge methods that begin so, with their summaries."""
    return [(name, row.summary) for name, row in METHODS.items() if name.startswith(incomplete)]


def run_folders(incomplete: str) -> list[str]:
    """Return run folders below the folder that is half typed; a shell offers files where there are none."""
    start, begun = os.path.split(incomplete)
    found = [folder for folder in _folders(Path(start or "."), begun) if (folder / _RUN_FILE).is_file()]
    return sorted(os.path.join(start, os.path.relpath(folder, start or ".")) for folder in found)


def run_methods(ctx: typer.Context, incomplete: str) -> list[str]:
    """Return the methods of the run that is named before on the command line."""
    points = _header(ctx).get("points", [])
    names = [entry.get("method", "") for entry in points if isinstance(entry, dict)] if isinstance(points, list) else []
    return [name for name in dict.fromkeys(names) if name and name != "sft" and name.startswith(incomplete)]


def run_rewards(ctx: typer.Context, incomplete: str) -> list[str]:
    """Return the rewards of the run that is named before on the command line, without audits."""
    rewards = _header(ctx).get("rewards", {})
    known = rewards.items() if isinstance(rewards, dict) else ()
    wanted = [name for name, spec in known if isinstance(spec, dict) and spec.get("role") != "audit"]
    return [name for name in wanted if name.startswith(incomplete)]


def run_minima(ctx: typer.Context, incomplete: str) -> list[str]:
    """Return the beginnings of NAME=VALUE for the rewards of the run."""
    return [] if "=" in incomplete else [f"{name}=" for name in run_rewards(ctx, incomplete)]


Run = Annotated[
    Path, typer.Argument(help="Run folder that `sweep` wrote.", show_default=False, autocompletion=run_folders)
]
Config = Annotated[Path, typer.Option(help="The project file.")]
Layers = Annotated[str | None, typer.Option(help=r"Pattern of the block list, e.g. 'blocks\.(\d+)\.'")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Begin anew where RUN was made by another configuration.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")]


def with_sweep_options(*, without: tuple[str, ...] = ()) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command an option for each field of `SweepOptions`; see `takes_sweep_options`."""
    return takes_sweep_options(without, _as_option)


def _as_option(option: Field[Any], kind: Any) -> Any:
    facts = dict(option.metadata)
    words = facts.pop("offers", None)
    return Annotated[kind, typer.Option(**facts, autocompletion=offer(*words) if words else None)]


def _folders(start: Path, begun: str) -> Iterator[Path]:
    """Yield the folders whose first part begins so, the near ones first, as many as a key press may cost."""
    level: Sequence[Path] = [start]
    left = _MOST_FOLDERS
    for depth in range(_DEPTH):
        following: list[Path] = []
        for path in (path for folder in level for path in _inside(folder)):
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
    """Return the `run.json` of the folder that is typed; {} where there is none."""
    # Before an option that lacks its value, arguments are not told from one another yet.
    for typed in (ctx.params.get("run"), *ctx.args):
        try:
            content = json.loads((Path(str(typed)) / _RUN_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(content, dict):
            return content
    return {}

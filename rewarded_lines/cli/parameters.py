"""Parameters that several commands share, and the words that a shell offers for a half-typed value.

A shell waits for completions at each key press: they open no file but a run's `run.json`, and never fail.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Callable
from dataclasses import Field
from itertools import chain, islice
from pathlib import Path
from typing import Annotated, Any

import typer

from rewarded_lines.merger.merge_options import TOWER_HELP

_RUN_FILE = "run.json"
# Limits of the search for runs below the half-typed folder.
_MOST_FOLDERS = 2000
_DEPTH = 3


def offer(*words: str) -> Callable[[str], list[str]]:
    """Return a completion that offers the words with the typed beginning."""
    return lambda incomplete: [word for word in words if word.startswith(incomplete)]


engines = offer("vllm", "hf")
outsides = offer("alpha", "depth")


def run_folders(incomplete: str) -> list[str]:
    """Return the run folders below the half-typed folder; without any, a shell offers files."""
    start = f"{glob.escape(incomplete)}*"
    folders = chain.from_iterable(glob.iglob(start + "/*" * depth + "/") for depth in range(_DEPTH))
    found = (folder.rstrip("/") for folder in islice(folders, _MOST_FOLDERS))
    return sorted(folder for folder in found if Path(folder, _RUN_FILE).is_file())


def run_methods(ctx: typer.Context, incomplete: str) -> list[str]:
    """Return the methods of the run on the command line."""
    points = _header(ctx).get("points", [])
    entries = [entry for entry in points if isinstance(entry, dict)] if isinstance(points, list) else []
    names = dict.fromkeys(entry.get("method", "") for entry in entries)
    return [name for name in names if name and name != "sft" and name.startswith(incomplete)]


def run_rewards(ctx: typer.Context, incomplete: str) -> list[str]:
    """Return the rewards of the run on the command line, without audits."""
    rewards = _header(ctx).get("rewards", {})
    known = rewards.items() if isinstance(rewards, dict) else ()
    wanted = [name for name, spec in known if isinstance(spec, dict) and spec.get("role") != "audit"]
    return [name for name in wanted if name.startswith(incomplete)]


def run_minima(ctx: typer.Context, incomplete: str) -> list[str]:
    """Return `NAME=` for each reward of the run."""
    return [] if "=" in incomplete else [f"{name}=" for name in run_rewards(ctx, incomplete)]


Run = Annotated[
    Path, typer.Argument(help="Run folder that `sweep` wrote.", show_default=False, autocompletion=run_folders)
]
Config = Annotated[Path, typer.Option(help="The project file.")]
Layers = Annotated[str | None, typer.Option(help=r"Pattern of the block list, e.g. 'blocks\.(\d+)\.'")]
Tower = Annotated[list[str] | None, typer.Option(help=TOWER_HELP)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a run of another configuration.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")]


def as_option(field: Field[Any], kind: Any) -> Any:
    """Return the annotation of a command-line option for a field.

    The field's metadata are arguments of `typer.Option`, and two more. `typed` is the type on the command line if it
    differs. `offers` are the words that shells offer, or a function that returns them.
    """
    facts = dict(field.metadata)
    kind, words = facts.pop("typed", kind), facts.pop("offers", None)
    # Without a spelling, typer adds `--no-...` to switches and keeps the underscore of `as_`.
    flag = facts.pop("flag", f"--{field.name.strip('_').replace('_', '-')}")
    completion = offer(*words) if isinstance(words, tuple) else words
    return Annotated[kind, typer.Option(flag, **facts, autocompletion=completion)]


def _header(ctx: typer.Context) -> dict[str, Any]:
    """Return the `run.json` of the typed folder, {} if it has none."""
    # Before an option without its value, typer has not yet assigned the arguments.
    for typed in (ctx.params.get("run"), *ctx.args):
        try:
            content = json.loads((Path(str(typed)) / _RUN_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(content, dict):
            return content
    return {}

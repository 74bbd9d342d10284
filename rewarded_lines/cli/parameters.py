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

from rewarded_lines.evaluator.sweep_options import takes_sweep_options

_RUN_FILE = "run.json"
# Folders looked into for runs, below the one that is half typed.
_MOST_FOLDERS = 2000
_DEPTH = 3


def offer(*words: str) -> Callable[[str], list[str]]:
    """Return a completion that offers those of the words that begin as what is typed."""
    return lambda incomplete: [word for word in words if word.startswith(incomplete)]


engines = offer("vllm", "hf")
outsides = offer("alpha", "depth")


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
    return takes_sweep_options(without, as_option)


def as_option(field: Field[Any], kind: Any) -> Any:
    """Return the annotation of a parameter that is the option of a field.

    The field's metadata are what `typer.Option` takes. Beside them `typed` is the type that the command line reads,
    where it is another one, and `offers` are the words that shells offer, or a function that returns them.
    """
    facts = dict(field.metadata)
    kind, words = facts.pop("typed", kind), facts.pop("offers", None)
    # Without this spelling typer adds a `--no-...` to switches, and keeps the underscore of `as_`.
    flag = facts.pop("flag", f"--{field.name.strip('_').replace('_', '-')}")
    completion = offer(*words) if isinstance(words, tuple) else words
    return Annotated[kind, typer.Option(flag, **facts, autocompletion=completion)]


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

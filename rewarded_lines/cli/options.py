"""Options that several commands share, each with the completion that shells offer for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import Field
from pathlib import Path
from typing import Annotated, Any

import typer

from rewarded_lines.cli.completion import offer, run_folders
from rewarded_lines.evaluation.sweep_options import takes_sweep_options

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
    return takes_sweep_options(without, _typed)


def _typed(option: Field[Any], kind: Any) -> Any:
    facts = dict(option.metadata)
    words = facts.pop("offers", None)
    return Annotated[kind, typer.Option(**facts, autocompletion=offer(*words) if words else None)]

"""`rewarded-lines inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from rewarded_lines.cli.display import progress_bar, show_json, show_line
from rewarded_lines.cli.parameters import AsJson, Layers, Quiet, Tower, outsides
from rewarded_lines.merger.spec import joined_towers


def inspect(
    checkpoint: Annotated[str, typer.Argument(help="Folder or Hub id of a model or LoRA adapter.", show_default=False)],
    base: Annotated[str | None, typer.Option(help="SFT model it was trained from: folder or Hub id.")] = None,
    alpha: Annotated[list[str] | None, typer.Option(help="LiNeS α: scale of the first block, by default 1.")] = None,
    beta: Annotated[list[str] | None, typer.Option(help="LiNeS β: added by the last block, by default 1.")] = None,
    schedule: Annotated[list[str] | None, typer.Option(help="A scale for each block: 1,1,1.2 or a file.")] = None,
    modules: Annotated[list[str] | None, typer.Option(help="Factors by kind of module: attention=1,mlp=0.8.")] = None,
    outside: Annotated[
        str,
        typer.Option(
            help="Scale of embeddings, norm and head: alpha, or depth (that of the nearest block).",
            autocompletion=outsides,
        ),
    ] = "alpha",
    layers: Layers = None,
    tower: Tower = None,
    tensors: Annotated[bool, typer.Option("--tensors", help="Show a row for every tensor.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw scale and norm over depth; .png, .svg or .pdf.")] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Show a checkpoint by depth: its blocks, their LiNeS scales and their distance from the base.

    τ = θ − θ_base is the residual, s = α + β·(ℓ−1)/(L−1) its LiNeS scale
    in block ℓ of L, ‖·‖ the L2 norm. Without --base, only headers are read.
    Inputs are never changed.

    \b
    rewarded-lines inspect ppo-helpful
    rewarded-lines inspect ppo-helpful --base sft --plot depth.pdf
    rewarded-lines inspect ppo-helpful --base sft --alpha 0.5 --tensors
    rewarded-lines inspect sft --alpha helpful=0.5 --beta brief=0 --plot s.pdf
        a line for each policy; --modules adds one for each kind of module
    rewarded-lines inspect merged --json | jq '.total.parameters'
    """
    from rewarded_lines.merger.inspect import inspect as run
    from rewarded_lines.reports.inspection_tables import as_dict, on_terminal

    if plot:
        from rewarded_lines.extras import require

        require("report", "inspect --plot", "matplotlib")
        from rewarded_lines.reports.figures.depth_figure import check_figure_file, write_depth_figure

        check_figure_file(plot)
    with progress_bar("Reading", quiet=quiet or as_json, unit="byte") as bar:
        how: Any = {"alpha": alpha, "beta": beta, "schedule": schedule, "modules": modules, "outside": outside}
        found = run(checkpoint, base, layers=layers, tower=joined_towers(tower), progress=bar, **how)
        if plot:
            bar.start("drawing")
            write_depth_figure(found, plot)
    console = Console(highlight=False)
    if as_json:
        show_json(as_dict(found, tensors))
        return
    for part in on_terminal(found, tensors, console.width):
        console.print(part)
    if plot:
        show_line(f"figure: {plot}")

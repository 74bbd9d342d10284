"""`rewarded-lines inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from rewarded_lines.cli.display import progress_bar, show_json, show_line
from rewarded_lines.cli.parameters import AsJson, Layers, Quiet, Tower, offer, outsides
from rewarded_lines.merger.merge_options import joined_towers

_Outside = Annotated[
    str,
    typer.Option(
        help="Scale of embeddings, norm and head: alpha, or depth (that of the nearest block).", autocompletion=outsides
    ),
]
_Spectra = Annotated[
    str,
    typer.Option(
        help="Singular values of several policies: sample (some blocks), all, none.",
        autocompletion=offer("sample", "all", "none"),
    ),
]


def inspect(
    checkpoint: Annotated[
        list[str], typer.Argument(help="Folder or Hub id of a model or LoRA adapter; several to compare.")
    ],
    base: Annotated[str | None, typer.Option(help="SFT model it was trained from: folder or Hub id.")] = None,
    alpha: Annotated[list[str] | None, typer.Option(help="LiNeS α: scale of the first block, by default 1.")] = None,
    beta: Annotated[list[str] | None, typer.Option(help="LiNeS β: added by the last block, by default 1.")] = None,
    schedule: Annotated[list[str] | None, typer.Option(help="A scale for each block: 1,1,1.2 or a file.")] = None,
    modules: Annotated[list[str] | None, typer.Option(help="Factors by kind of module: attention=1,mlp=0.8.")] = None,
    outside: _Outside = "alpha",
    layers: Layers = None,
    tower: Tower = None,
    spectra: _Spectra = "sample",
    tensors: Annotated[bool, typer.Option("--tensors", help="Show a row for every tensor.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw all this over depth; .png, .svg or .pdf.")] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Show a checkpoint by depth: its blocks, their LiNeS scales and their distance from the base.

    τ = θ − θ_base is the residual, s = α + β·(ℓ−1)/(L−1) its LiNeS scale
    in block ℓ of L, ‖·‖ the L2 norm. Without --base, only headers are read.
    Inputs are never changed.

    Several policies are compared: which values each changed, how many they
    share, signs and cosines by block, rank of the residuals (what a LoRA
    could hold), and what that implies for methods.

    \b
    rewarded-lines inspect ppo-helpful
    rewarded-lines inspect ppo-helpful --base sft --plot depth.pdf
    rewarded-lines inspect ppo-helpful --base sft --alpha 0.5 --tensors
    rewarded-lines inspect sft --alpha helpful=0.5 --beta brief=0 --plot s.pdf
        a line for each policy; --modules adds one for each kind of module
    rewarded-lines inspect --base sft ppo-helpful ppo-brief
    rewarded-lines inspect merged --json | jq '.total.parameters'
    """
    from rewarded_lines.merger.inspect import inspect as run

    if plot:
        _check(plot)
    with progress_bar("Reading", quiet=quiet or as_json, unit="byte") as bar:
        how: Any = {"alpha": alpha, "beta": beta, "schedule": schedule, "modules": modules, "outside": outside}
        how |= {"layers": layers, "tower": joined_towers(tower)}
        several: Any = checkpoint if len(checkpoint) > 1 else checkpoint[0]
        found: Any = run(several, base, progress=bar, spectra=spectra, **how)
        if plot:
            bar.start("drawing")
            _draw(found, plot, len(checkpoint) > 1)
    _show(found, tensors, len(checkpoint) > 1, as_json)
    if plot and not as_json:
        show_line(f"figure: {plot}")


def _check(plot: Path) -> None:
    from rewarded_lines.extras import require

    require("report", "inspect --plot", "matplotlib")
    from rewarded_lines.reports.figures.figure_style import check_figure_file

    check_figure_file(plot)


def _draw(found: Any, plot: Path, several: bool) -> None:
    from rewarded_lines.reports.figures.depth_figure import comparison_figure, depth_figure
    from rewarded_lines.reports.figures.figure_style import write_figure

    write_figure(plot, lambda: comparison_figure(found) if several else depth_figure(found))


def _show(found: Any, tensors: bool, several: bool, as_json: bool) -> None:
    from rewarded_lines.reports.comparison_tables import comparison_dict, comparison_tables
    from rewarded_lines.reports.inspection_tables import as_dict, on_terminal

    console = Console(highlight=False)
    if as_json:
        show_json((comparison_dict if several else as_dict)(found, tensors))
        return
    for part in comparison_tables(found, tensors) if several else on_terminal(found, tensors, console.width):
        console.print(part)

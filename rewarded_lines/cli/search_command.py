"""`rewarded-lines search`."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rewarded_lines.cli.display import progress_bar, quiet_libraries, show_json, tell_missing, tell_rows
from rewarded_lines.cli.parameters import AsJson, Quiet, Run, as_option, engines, run_methods
from rewarded_lines.evaluator.shape_options import ShapeOptions, takes_shape_options
from rewarded_lines.evaluator.sweep_options import SweepOptions, takes_sweep_options

if TYPE_CHECKING:
    from rewarded_lines.evaluator.search import Found
    from rewarded_lines.evaluator.shape_search import FoundShape
    from rewarded_lines.pareto.bootstrap import Estimate


@takes_sweep_options(annotate=as_option)
@takes_shape_options(annotate=as_option)
def search(
    *,
    run: Run,
    config: Annotated[Path | None, typer.Option(help="Project file; the run's own by default.")] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(help="Method to search (repeat); all merges by default.", autocompletion=run_methods),
    ] = None,
    points: Annotated[int, typer.Option(min=2, help="Most λ of each method.")] = 15,
    gain: Annotated[float, typer.Option(min=0, help="Stop when no λ can gain more than this share.")] = 0.001,
    engine: Annotated[
        str | None, typer.Option(help="vllm, hf or a URL; the run's own by default.", autocompletion=engines)
    ] = None,
    shapes: ShapeOptions,
    options: SweepOptions,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Add λ points to a run where they raise a method's front most, until a budget or a least gain is reached.

    With --config a new run starts with three λ of each method. With two
    policies the straight line between neighbouring points counts, too: it
    is reached by drawing, for each prompt, one of the two to answer.

    With --shape a scale for every block is searched instead, by the
    hypervolume on validation prompts. At the end it is measured on the test
    prompts beside LiNeS, soups, α and β of as many trials, and a constant
    scale with its norm. A killed search continues.

    \b
    rewarded-lines search runs/demo/sweep --points 15
    rewarded-lines search runs/adaptive --method lines \\
        --config runs/demo/rewarded-lines.yaml
    rewarded-lines search runs/demo/sweep --shape spline --knots 4 \\
        --validation runs/demo/data/validation.jsonl
    """
    with progress_bar("Search", quiet=quiet or as_json, unit="point") as bar:
        from rewarded_lines.evaluator.missing_scores import missing_json
        from rewarded_lines.evaluator.search import search as run_search
        from rewarded_lines.extras import is_installed

        quiet_libraries()
        how: Any = {"config": config, "points": points, "gain": gain, "engine": engine, "options": options}
        done, found = run_search(run, methods=method or (), shapes=shapes, progress=bar, **how)
        if not isinstance(found, list) and is_installed("matplotlib"):
            from rewarded_lines.reports.figures.depth_figure import shape_figure
            from rewarded_lines.reports.figures.figure_style import write_figure

            # Beside the file of the trials.
            write_figure(Path(found.file).with_suffix(".png"), partial(shape_figure, found))
    tell_rows(done.header, quiet or as_json)
    tell_missing(done, quiet or as_json)
    if as_json:
        content = {"methods": [asdict(one) for one in found]} if isinstance(found, list) else {"shape": asdict(found)}
        show_json({"folder": str(done.folder), **content, **missing_json(done.missing)})
    elif isinstance(found, list):
        _show_points(found)
        typer.echo(f"show them: rewarded-lines report {done.folder}")
    else:
        _show_shape(found)


def _show_points(found: list[Found]) -> None:
    for one in found:
        why = "the budget is spent" if one.reason == "points" else "no λ can gain more"
        line = f"{one.method}: {one.points} points ({one.added} added), hypervolume {one.hypervolume:.4g}"
        line += " above the worst of SFT and the policies (no λ is above SFT on all)" if one.above != "sft" else ""
        line += f" ± {one.error:.1%} (approximated)" if one.error else ""
        line += f", of the line through them {one.mixed:.4g}" if one.mixed is not None else ""
        Console().print(Text(f"{line}; {why}: the next could add {one.potential:.2g} at most"))


def _show_shape(found: FoundShape) -> None:
    """Print the scales, the schedules on the test prompts, the verdict, and the rows for the project."""
    console, (tried, whole) = Console(), found.trials
    console.print(Text(f"best of {tried} shapes on validation prompts ({whole} of them on all); scale by block:"))
    for policy, row in found.scales.items():
        console.print(Text(f"  {policy}: {' '.join(f'{scale:.3g}' for scale in row)}"))
    console.print(Text("\non the test prompts, hypervolume above SFT with 95% interval:"))
    table = Table("schedule", "hypervolume", "shape − it", "largest KL", box=None, pad_edge=False)
    change = {one.other: _shown(one.difference, "+") for one in found.differences}
    names = {"tuned": "tuned: α = {:g}, β = {:g}".format(*found.tuned)}
    for one in found.volumes:
        cells = names.get(one.method, one.method), _shown(one.hypervolume), change.get(one.method, "")
        table.add_row(*map(Text, cells), f"{found.kl[one.method]:.3g}")
    console.print(table)
    console.print(Text(f"\n{found.verdict}\n", style="bold"))
    rows = f"to keep them in the run, add these under `sweep.methods:` and sweep:\n{found.rows}"
    console.print(Text(f"{rows}\ntrials, and beside them the figure: {found.file}"), soft_wrap=True)


def _shown(one: Estimate, sign: str = "") -> str:
    return f"{one.value:{sign}.4g} [{one.low:.4g}, {one.high:.4g}]"

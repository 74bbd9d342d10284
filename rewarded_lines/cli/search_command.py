"""`rewarded-lines search`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from rewarded_lines.cli.display import progress_bar, quiet_libraries, show_json, tell_rows
from rewarded_lines.cli.parameters import AsJson, Quiet, Run, engines, run_methods, with_sweep_options
from rewarded_lines.evaluator.sweep_options import SweepOptions


@with_sweep_options()
def search(
    *,
    run: Run,
    config: Annotated[Path | None, typer.Option(help="The project file; the run's own by default.")] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(help="Whose front (repeat); all merges by default.", autocompletion=run_methods),
    ] = None,
    points: Annotated[int, typer.Option(min=2, help="λ that each method has at most in the end.")] = 15,
    gain: Annotated[float, typer.Option(min=0, help="End when no λ can add more than this share.")] = 0.001,
    engine: Annotated[
        str | None, typer.Option(help="vllm, hf or a URL; the run's own by default.", autocompletion=engines)
    ] = None,
    options: SweepOptions,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Add λ points to a run where they raise a method's front most, until a budget or a gain is reached.

    With --config a new run begins with three λ of each method. With two
    policies, the line through the points can be reached, too: let one of two
    neighbouring points, drawn by lot, answer each prompt.

    \b
    rewarded-lines search runs/demo/sweep --points 15
    rewarded-lines search runs/adaptive --method lines \\
        --config runs/demo/rewarded-lines.yaml
    """
    with progress_bar("Search", quiet=quiet or as_json, unit="point") as bar:
        from rewarded_lines.evaluator.search import search as run_search

        quiet_libraries()
        done, found = run_search(
            run,
            config=config,
            methods=method or (),
            points=points,
            gain=gain,
            progress=bar,
            engine=engine,
            options=options,
        )
    tell_rows(done.header, quiet or as_json)
    if as_json:
        show_json({"folder": str(done.folder), "methods": [asdict(one) for one in found]})
        return
    for one in found:
        why = "the budget is spent" if one.reason == "points" else "no λ promises more"
        told = f"{one.method}: {one.points} points ({one.added} added), hypervolume {one.hypervolume:.4g}"
        told += f", of the line through them {one.mixed:.4g}" if one.mixed is not None else ""
        typer.echo(f"{told}; {why}: the next could add {one.potential:.2g} at most")
    typer.echo(f"look at them: rewarded-lines report {done.folder}")

"""`rewarded-lines sweep`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from rewarded_lines.cli.progress import progress_bar, quiet_libraries


def sweep(
    config: Annotated[Path, typer.Option(help="The project file.")] = Path("rewarded-lines.yaml"),
    points: Annotated[int | None, typer.Option(min=2, help="λ values from 0 to 1; the project's by default.")] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; `sweep` beside the project file by default.")] = None,
    engine: Annotated[str, typer.Option(help="vllm, or hf (transformers; slower, no engine).")] = "vllm",
    device: Annotated[str, typer.Option(help="Where reward models run: auto, cpu, cuda.")] = "auto",
    layers: Annotated[str | None, typer.Option(help=r"Pattern of the block list, e.g. 'blocks\.(\d+)\.'")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the run's description as JSON.")] = False,
) -> None:
    """Merge, generate and score along λ, for every method and the SFT model, in one engine.

    Points that are there are not made again: a killed sweep goes on where it stopped.

    \b
    rewarded-lines sweep
        the project in ./rewarded-lines.yaml, into ./sweep
    rewarded-lines sweep --config runs/demo/rewarded-lines.yaml --points 5 --engine hf --out runs/quick
    """
    from rewarded_lines.evaluation.sweep import sweep as run

    quiet_libraries()
    with progress_bar("Sweep", quiet=as_json) as bar:
        done = run(
            config,
            points=points,
            out=out,
            engine=engine,
            device=device,
            layers=layers,
            progress=lambda name, count, total: bar(count, total),
        )
    if as_json:
        typer.echo(json.dumps({"folder": str(done.folder), **done.header}, indent=2, ensure_ascii=False))
    else:
        typer.echo(f"{len(done.points)} points in {done.folder}; look at them: rewarded-lines report {done.folder}")

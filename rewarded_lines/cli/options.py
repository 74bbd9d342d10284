"""Options that several commands share, each with the completion that shells offer for it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rewarded_lines.cli.completion import devices, engines, offloads, run_folders

Run = Annotated[
    Path, typer.Argument(help="Run folder that `sweep` wrote.", show_default=False, autocompletion=run_folders)
]
Config = Annotated[Path, typer.Option(help="The project file.")]
Engine = Annotated[
    str,
    typer.Option(
        help="vllm, hf (transformers; slower), or the URL of a server that takes adapters.", autocompletion=engines
    ),
]
Device = Annotated[str, typer.Option(help="Where reward models run: auto, cpu, cuda.", autocompletion=devices)]
Layers = Annotated[str | None, typer.Option(help=r"Pattern of the block list, e.g. 'blocks\.(\d+)\.'")]
TensorParallel = Annotated[int, typer.Option(min=1, help="Devices that vLLM spreads the model over.")]
Offload = Annotated[
    str, typer.Option(help="Reward models leave memory when idle: auto, always, never.", autocompletion=offloads)
]
Ray = Annotated[
    str | None,
    typer.Option(help="Share the points out over Ray workers: HOST:PORT, auto, or local.", metavar="ADDRESS"),
]
Workers = Annotated[int | None, typer.Option(min=1, help="With --ray: how many.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Begin anew where RUN was made by another configuration.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")]

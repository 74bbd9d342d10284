"""`rewarded-lines sweep`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rewarded_lines.cli.display import progress_bar, quiet_libraries, show_json, tell_missing, tell_rows
from rewarded_lines.cli.parameters import AsJson, Config, Overwrite, Quiet, as_option
from rewarded_lines.evaluator.sweep_options import SweepOptions, takes_sweep_options


@takes_sweep_options(annotate=as_option)
def sweep(
    *,
    config: Config = Path("rewarded-lines.yaml"),
    points: Annotated[
        int | None, typer.Option(min=2, help="λ of each method: on each edge of the simplex, or in all; see below.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; by default `sweep` beside the project file.")] = None,
    options: SweepOptions,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Merge, generate and score along λ, for every method and the SFT model, in one engine.

    Existing points are kept: a killed sweep goes on where it stopped.
    The project's `sweep.methods` are compared; with `sweep.tune`, α and β
    are searched first, on validation prompts.

    Up to three policies, --points counts the λ on each edge of a lattice. From
    four on it counts all λ: every single policy, the centre, the middles of
    the edges, then a Sobol sequence. `sweep.design` chooses: lattice or spread.
    More points keep the earlier ones.

    \b
    rewarded-lines sweep
        the project in ./rewarded-lines.yaml, into ./sweep
    rewarded-lines sweep --config runs/demo/rewarded-lines.yaml \\
        --points 5 --engine hf --out runs/quick
    rewarded-lines sweep --ray 10.0.0.1:6379
        on a Ray cluster, one engine on each of its GPUs
    rewarded-lines sweep --engine-arg max_num_seqs=64
        with an argument of vLLM; `engine:` in the project holds more
    rewarded-lines sweep --engine http://10.0.0.1:8000
        LoRA policies on a running vLLM server
    """
    with progress_bar("Sweep", quiet=quiet or as_json, unit="point") as bar:
        from rewarded_lines.evaluator.missing_scores import missing_json
        from rewarded_lines.evaluator.sweep import sweep as run

        quiet_libraries()
        done = run(config, points=points, out=out, overwrite=overwrite, progress=bar, options=options)
    tell_rows(done.header, quiet or as_json)
    tell_missing(done, quiet or as_json)
    if as_json:
        show_json({"folder": str(done.folder), **done.header, **missing_json(done.missing)})
    else:
        typer.echo(f"{len(done.points)} points in {done.folder}; show them: rewarded-lines report {done.folder}")

"""`rewarded-lines serve`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from rewarded_lines.cli.display import progress_bar, quiet_libraries
from rewarded_lines.cli.parameters import Quiet, as_option, run_folders
from rewarded_lines.serving.serve_options import ServeOptions, takes_serve_options


@takes_serve_options(annotate=as_option)
def serve(
    run: Annotated[
        Path | None,
        typer.Argument(help="Run folder that `sweep` wrote.", show_default=False, autocompletion=run_folders),
    ] = None,
    *,
    config: Annotated[
        Path | None, typer.Option(help="The project file; by default the run's, or rewarded-lines.yaml.")
    ] = None,
    options: ServeOptions,
    as_json: Annotated[bool, typer.Option("--json", help="Print the address as JSON once it answers.")] = False,
    quiet: Quiet = False,
) -> None:
    """Serve the policies of a project or a run: each request says what it prefers.

    This is vLLM's OpenAI-compatible server, with a small page at /. LoRA
    policies are merged by request. Requests name λ in the body, as
    {"preference": {"helpful": 0.7, "brief": 0.3}}, or by the model's name, as
    lines@0.35. Points that `choose` named, such as chosen, are models, too.

    Whole policies are one merge for all requests. POST /preference changes it
    in place and needs the admin key. With --rank they become adapters, and
    the command tells how much these hold.

    GET /preferences and /v1/models list what one can ask for. The header
    x-rewarded-lines-model of an answer says which merge gave it. Health and
    metrics are vLLM's. Everything is checked before vLLM starts.

    \b
    rewarded-lines serve
        the project in ./rewarded-lines.yaml, on http://127.0.0.1:8000
    rewarded-lines serve runs/demo/sweep --at-least detailed=15
        requests without a preference get the best λ with this mean
    rewarded-lines serve --lam helpful=0.7,brief=0.3 --row lines
    rewarded-lines serve --rank 32 --engine-arg max_num_seqs=64
    rewarded-lines serve --host 0.0.0.0 --api-key "$KEY"
    """
    with progress_bar("Serve", quiet=quiet) as bar:
        from rewarded_lines.serving.keep_server import keeping
        from rewarded_lines.serving.server_plan import plan_server

        quiet_libraries()
        plan = plan_server(run, config, options, bar, "json" if as_json else "text")
    for note in () if quiet else (*plan.told, f"starting vLLM for {plan.url}"):
        typer.echo(note, err=True)
    # In place of this process, which holds the memory of what it checked.
    command = keeping(plan.command)
    os.execve(command[0], command, dict(plan.environment))

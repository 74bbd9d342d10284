"""`rewarded-lines score`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from rewarded_lines.cli.display import progress_bar, quiet_libraries, show_json, tell_rows
from rewarded_lines.cli.parameters import AsJson, Config, Overwrite, Quiet, as_option
from rewarded_lines.evaluator.sweep_options import SweepOptions, takes_sweep_options


@takes_sweep_options(without=("ray", "workers"), annotate=as_option)
def score(
    *,
    model: Annotated[str, typer.Argument(help="Folder of a model or LoRA adapter, or a Hub id.", show_default=False)],
    config: Config = Path("rewarded-lines.yaml"),
    out: Annotated[Path | None, typer.Option(help="Run folder for the records; none by default.")] = None,
    options: SweepOptions,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Score one model and the SFT model with the project's rewards, on the same prompts.

    \b
    rewarded-lines score merged/lam=0.30
        with the rewards, prompts and settings of ./rewarded-lines.yaml
    rewarded-lines score merged --config runs/demo/rewarded-lines.yaml --json
    """
    with progress_bar("Score", quiet=quiet or as_json, unit="point") as bar:
        from rewarded_lines.evaluator.sweep import score as run
        from rewarded_lines.reports.summary import summarise

        quiet_libraries()
        done = run(model, config, out=out, overwrite=overwrite, progress=bar, options=options)
        bar.start("bootstrap")
        summary = summarise(done)
    tell_rows(done.header, quiet or as_json)
    if as_json:
        sft, policy = summary.points
        found = {"model": policy.as_dict(), "sft": sft.as_dict(), "gain": asdict(summary.policy_gains[0])["rewards"]}
        show_json(found)
        return
    from rewarded_lines.reports.tables import points_sheet, policy_sheet, side_sheet

    console = Console()
    for sheet in (points_sheet(summary), side_sheet(summary), policy_sheet(summary)):
        console.print(sheet)
    if out is not None:
        typer.echo(f"records in {out}; figure: rewarded-lines report {out}")

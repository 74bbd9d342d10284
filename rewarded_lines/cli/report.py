"""`rewarded-lines report`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    from rewarded_lines.summaries.summary import Summary


def report(
    run: Annotated[Path, typer.Argument(help="Run folder that `sweep` wrote.", show_default=False)],
    more: Annotated[
        list[Path] | None,
        typer.Argument(help="Runs with policies of other training seeds, averaged with it.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Show a sweep: every point with its interval, hypervolumes, a figure.

    Hypervolume is taken above two reference points: SFT's own scores, and
    the worst score of any point on each axis. Intervals are by bootstrap
    over prompts. Writes summary.json, table.md, points.csv, front.png and
    front.svg to RUN/report. An unfinished sweep is shown as far as it is.

    \b
    rewarded-lines report runs/demo/sweep
    rewarded-lines report runs/demo/sweep --json | jq '.hypervolumes'
    rewarded-lines report runs/demo/sweep runs/demo-seed1/sweep runs/demo-seed2/sweep
        averages over three training seeds, a second level of the bootstrap
    """
    from rewarded_lines.reporting.report import report as make_report

    summary = make_report(run, *(more or ()))
    if as_json:
        typer.echo(json.dumps(summary.as_dict(), indent=2, ensure_ascii=False))
    else:
        show(run, Console(), summary)


def show(run: Path, console: Console, summary: Summary | None = None) -> None:
    """Print the tables of a run that has its report, and the paths of the report's files.

    Args:
        run: the run folder.
        console: where to print.
        summary: what `report` returned; computed again from the run's records when not given.
    """
    from rewarded_lines.evaluation.records import load_run
    from rewarded_lines.reporting.report import FILES
    from rewarded_lines.summaries.summary import summarise
    from rewarded_lines.summaries.tables import rich_table, scope_note, sheets

    summary = summary or summarise(load_run(run))
    for sheet in sheets(summary, brief=True):
        console.print(rich_table(sheet))
    console.print(Text(scope_note(summary) + "\n"))
    for name in FILES:
        # Never folded: a path is for copying.
        console.print(Text(str(run / "report" / name)), soft_wrap=True)

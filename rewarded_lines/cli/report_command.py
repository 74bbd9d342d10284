"""`rewarded-lines report`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from rewarded_lines.cli.display import progress_bar, show_json, show_line
from rewarded_lines.cli.parameters import AsJson, Quiet, Run, run_folders
from rewarded_lines.errors import fail

if TYPE_CHECKING:
    from rewarded_lines.reports.summary import Summary

Formats = Annotated[
    list[str] | None,
    typer.Option("--format", help="Figure format: png, svg or pdf (repeat); png and svg by default."),
]
Style = Annotated[
    str, typer.Option(help="Figure style: paper, slides, grey, or a .mplstyle file.", metavar="NAME|FILE")
]
More = Annotated[
    list[Path] | None,
    typer.Argument(help="Runs of other seeds, averaged with RUN.", show_default=False, autocompletion=run_folders),
]
Depth = Annotated[bool, typer.Option("--depth", help="Draw scales and residuals by block (reads all weights).")]
Resamples = Annotated[
    int | None, typer.Option(min=100, help="Bootstrap resamples; the project's by default.", show_default=False)
]
Exact = Annotated[bool, typer.Option("--exact", help="Approximate no hypervolume, however long it takes.")]
Power = Annotated[bool, typer.Option("--power", help="Say how small a difference could be found, and what one needs.")]
Size = Annotated[
    str | None,
    typer.Option(help="With --power: plan for 5, or 10%, in hypervolume; by default what is seen.", show_default=False),
]
MaxKl = Annotated[
    str | None,
    typer.Option(help="Also compare at equal KL, within each of these nats.", metavar="3,5,10", show_default=False),
]


def report(
    run: Run,
    more: More = None,
    formats: Formats = None,
    style: Style = "paper",
    depth: Depth = False,
    resamples: Resamples = None,
    exact: Exact = False,
    power: Power = False,
    size: Size = None,
    max_kl: MaxKl = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Show a sweep: every point with its interval, hypervolumes, figures.

    Hypervolumes have two reference points: the scores of SFT, and the worst
    score of any point on each axis. Intervals are bootstrapped over
    prompts. An unfinished sweep is shown as far as it has points. The command
    tells first what takes long. Resamples of many rewards that would take a
    core 2 minutes are approximated, and the report gives the error.

    RUN/report receives summary.json, table.md, points.csv and figures.
    The figures are front, kl (each reward over KL to SFT), forgetting (over
    the perplexity of control texts) and training (the recipes' logs).
    Three policies add simplex, four rewards parallel, and --depth depth.
    report.html is an interactive front with every response and the merge
    commands; it needs no network.

    With --max-kl, a point beyond a limit lets SFT answer some prompts, by
    lot. Methods that differ only in the length of their step are one.

    \b
    rewarded-lines report runs/demo/sweep
    rewarded-lines report runs/demo/sweep --format pdf --style slides
    rewarded-lines report runs/demo/sweep --json | jq '.hypervolumes'
    rewarded-lines report runs/demo/sweep --max-kl 3,5,10
    rewarded-lines report runs/demo/sweep \\
        runs/demo-seed1/sweep runs/demo-seed2/sweep
        averages over three training seeds, a second level of the bootstrap
    rewarded-lines report runs/demo/sweep --power --size 10%
        how many prompts find a difference of a tenth in hypervolume
    """
    if size is not None and not power:
        raise fail("only with --power", where="--size", expected="--power --size 10%")
    with progress_bar("Report", quiet=quiet or as_json, unit="hypervolume") as bar:
        from rewarded_lines.reports.kl_budgets import parse_budgets
        from rewarded_lines.reports.page.page import lacking
        from rewarded_lines.reports.report import report as make_report

        how: Any = {"style": style, "depth": depth, "resamples": resamples, "exact": exact}
        how["power"] = size if size is not None else power
        how["max_kl"] = parse_budgets(max_kl)
        summary = make_report(run, *(more or ()), formats=formats or ("png", "svg"), progress=bar, **how)
    if note := lacking():
        typer.echo(note, err=True)
    if as_json:
        show_json(summary.as_dict())
    else:
        show(run, summary, chart=not quiet)


def show(run: Path, summary: Summary, chart: bool) -> None:
    """Print the tables of a run, the front as a chart if wanted, and the paths of its report."""
    from rewarded_lines.reports.report import report_files
    from rewarded_lines.reports.tables import sheets
    from rewarded_lines.reports.terminal_chart import FrontChart
    from rewarded_lines.reports.texts import scope_note

    console = Console()
    for sheet in sheets(summary, brief=True):
        console.print(sheet)
    console.print(Text(scope_note(summary) + "\n"))
    if chart:
        console.print(FrontChart(summary))
        console.print()
    for path in report_files(run):
        show_line(str(path))

"""The verb `report`: a run folder's numbers, tables and figures, written into its `report/` folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rewarded_lines.drawing.figures import NAMES, figures
from rewarded_lines.drawing.residuals import run_depth_figure
from rewarded_lines.drawing.style import FORMATS, PAPER, check_style, figure_bytes
from rewarded_lines.errors import did_you_mean, fail
from rewarded_lines.evaluation.records import Run, load_run
from rewarded_lines.evaluation.setup import located
from rewarded_lines.folders import write_bytes, write_json
from rewarded_lines.inspecting.inspect import Inspection, inspect
from rewarded_lines.pages.page import lacking, page
from rewarded_lines.summaries.summary import Summary, summarise
from rewarded_lines.summaries.tables import markdown, points_csv
from rewarded_lines.summaries.training import read_trainings

TABLES = ("summary.json", "table.md", "points.csv")
PAGE = "report.html"


def report(
    run: Path | str,
    *more: Path | str,
    formats: Sequence[str] = ("png", "svg"),
    style: str = PAPER,
    depth: bool = False,
) -> Summary:
    """Summarise a run and write its tables and figures into the `report/` folder in it.

    An unfinished run is summarised on the points it has. Every file is replaced whole; the numbers are
    written before the figures are drawn. Figures: the front; and where the run has the data each reward over KL, over
    the perplexity of control texts, over the weights of three policies, parallel coordinates of four rewards or more,
    and the training of its policies. Last comes the page, unless plotly is missing.

    Args:
        run: the folder that `sweep` wrote.
        more: runs of the same project with policies of other training seeds; all are averaged, and training is a
            second level of the bootstrap.
        formats: of the figures: "png", "svg", "pdf".
        style: of the figures: "paper", "slides", "grey", or the path of a matplotlib style file.
        depth: also draw scales and residuals by block, for which the weights of SFT and policies are read.

    Returns:
        What summary.json holds.

    Raises:
        UserError: the folder is no run or its points cannot be compared; there is no such format or style; matplotlib
            is not installed; or, with `depth`, SFT or a policy is not where the run says.
    """
    _check_formats(formats)
    check_style(style)
    runs = [load_run(folder) for folder in (run, *more)]
    summary = summarise(runs)
    folder = runs[0].folder / "report"
    write_json(folder / "summary.json", summary.as_dict())
    write_bytes(folder / "table.md", markdown(summary).encode())
    write_bytes(folder / "points.csv", points_csv(summary).encode())
    for name, figure in figures(summary, read_trainings(runs), style):
        for kind in formats:
            write_bytes(folder / f"{name}.{kind}", figure_bytes(figure, kind, style))
    if depth:
        figure = run_depth_figure(summary, _inspections(runs[0]), style)
        for kind in formats:
            write_bytes(folder / f"depth.{kind}", figure_bytes(figure, kind, style))
    if not lacking():
        write_bytes(folder / PAGE, page(runs, summary))
    return summary


def report_files(run: Path | str) -> list[Path]:
    """Return the files that reports of a run have written, tables first.

    Args:
        run: the run folder.
    """
    names = [*TABLES, PAGE, *(f"{name}.{kind}" for name in NAMES for kind in FORMATS)]
    paths = [Path(run) / "report" / name for name in names]
    return [path for path in paths if path.is_file()]


def _check_formats(formats: Sequence[str]) -> None:
    for kind in formats:
        if kind not in FORMATS:
            remedy = did_you_mean(kind, FORMATS)
            raise fail(f"unknown format `{kind}`", where="--format", expected=", ".join(FORMATS), remedy=remedy)


def _inspections(run: Run) -> Mapping[str, Inspection]:
    """Return how far each block of each policy lies from the SFT model."""
    policies = run.header.get("policies", {})
    if not policies:
        raise fail("the run names no policies", where=str(run.folder), remedy="leave --depth out")
    base = located(str(run.header["base"]["path"]), run.folder)
    layers = run.header.get("options", {}).get("layers")
    return {
        name: inspect(located(str(policy["path"]), run.folder), base, layers=layers)
        for name, policy in policies.items()
    }

"""`report` writes the numbers, tables, figures and page of a run into its folder `report/`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rewarded_lines.errors import did_you_mean, fail
from rewarded_lines.evaluator.records import Run, load_run
from rewarded_lines.folders import write_bytes, write_json
from rewarded_lines.merger.inspect import Inspection, inspect
from rewarded_lines.progress import SILENT, Progress
from rewarded_lines.references import located
from rewarded_lines.reports.figures.depth_figure import run_depth_figure
from rewarded_lines.reports.figures.figure_style import FORMATS, PAPER, check_style, figure_bytes, house_style
from rewarded_lines.reports.figures.front_figures import forgetting_figure, front_figure, kl_figure
from rewarded_lines.reports.figures.many_rewards import parallel_figure
from rewarded_lines.reports.figures.simplex_figure import simplex_figure
from rewarded_lines.reports.figures.training_curves import Training, read_trainings, training_figure
from rewarded_lines.reports.page.page import lacking, page
from rewarded_lines.reports.summary import Summary, summarise
from rewarded_lines.reports.tables import markdown, points_csv

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TABLES = ("summary.json", "table.md", "points.csv")
PAGE = "report.html"
_FEWEST = 100
FIGURES = ("front", "kl", "forgetting", "simplex", "parallel", "training", "depth")
"""All figures of a report; "depth" reads the weights and is drawn only on request."""


def report(
    run: Path | str,
    *more: Path | str,
    formats: Sequence[str] = ("png", "svg"),
    style: str = PAPER,
    depth: bool = False,
    resamples: int | None = None,
    exact: bool = False,
    max_kl: Sequence[float] = (),
    power: bool | float | str = False,
    progress: Progress = SILENT,
) -> Summary:
    """Summarise a run, write its numbers, tables, figures and page into its folder `report/`, return the summary.

    An unfinished run is summarised from its finished points. Each file is replaced atomically.
    The page is written last, and only if plotly is installed.

    Args:
        run: the folder that `sweep` wrote.
        more: runs of the same project with other training seeds. All runs are averaged;
            training becomes a second level of the bootstrap.
        formats: of the figures: "png", "svg", "pdf".
        style: of the figures: "paper", "slides", "grey", or the path of a matplotlib style file.
        depth: also draw scales and residuals by block; this reads the weights.
        resamples: of the bootstrap, at least 100; by default as many as the project asks for.
        exact: compute every hypervolume exactly, which takes long with many rewards and points.
        max_kl: also compare the methods at equal KL, within each of so many nats.
        power: also say how small a difference the runs could find with 80% power, and how many prompts and runs a
            difference needs: True for the one seen, else one in hypervolume, such as 5 or "10%".
        progress: is told what takes long before it begins, and receives the finished hypervolumes.

    Raises:
        UserError: there are too few resamples, the folder is not a run, its points cannot be compared, a format or
            the style is unknown, matplotlib is missing, `depth` does not find SFT or a policy, or `power` asks for
            what the runs cannot say.
    """
    for kind in formats:
        if kind not in FORMATS:
            remedy, known = did_you_mean(kind, FORMATS), ", ".join(FORMATS)
            raise fail(f"unknown format `{kind}`", where="--format", expected=known, remedy=remedy)
    check_style(style)
    if resamples is not None and resamples < _FEWEST:
        raise fail("too few resamples", where="--resamples", expected=f"{_FEWEST} or more", got=str(resamples))
    progress.start("reading the run, bootstrap")
    runs = [load_run(folder) for folder in (run, *more)]
    summary = summarise(runs, resamples=resamples, exact=exact, max_kl=max_kl, power=power, progress=progress)
    progress.start("tables and figures")
    folder = runs[0].folder / "report"
    write_json(folder / "summary.json", summary.as_dict())
    write_bytes(folder / "table.md", markdown(summary).encode())
    write_bytes(folder / "points.csv", points_csv(summary).encode())
    with house_style(style):
        inspections = _inspections(runs[0]) if depth else {}
        for name, figure in figures(summary, read_trainings(runs), inspections):
            for kind in formats:
                write_bytes(folder / f"{name}.{kind}", figure_bytes(figure, kind))
    if not lacking():
        write_bytes(folder / PAGE, page(runs, summary))
    return summary


def figures(
    summary: Summary,
    trainings: Sequence[Training] = (),
    inspections: Mapping[str, Inspection] | None = None,
) -> Iterator[tuple[str, Figure]]:
    """Yield the name (see `FIGURES`) and figure of everything that the run has data for.

    Each is drawn in the current style, see `house_style`.
    """
    yield "front", front_figure(summary)
    # With a single reward the front already shows KL.
    if len(summary.rewards) > 1:
        yield "kl", kl_figure(summary)
    if summary.controls:
        yield "forgetting", forgetting_figure(summary)
    if len(summary.policies) == 3 and (simplex := simplex_figure(summary)):
        yield "simplex", simplex
    if len(summary.objectives) >= 4:
        yield "parallel", parallel_figure(summary)
    if trainings and (training := training_figure(trainings)):
        yield "training", training
    if inspections:
        yield "depth", run_depth_figure(summary, inspections)


def report_files(run: Path | str) -> list[Path]:
    """Return the existing files of a run's report, tables first."""
    drawings = [f"{name}.{kind}" for name in FIGURES for kind in FORMATS]
    paths = [Path(run) / "report" / name for name in (*TABLES, PAGE, *drawings)]
    return [path for path in paths if path.is_file()]


def _inspections(run: Run) -> Mapping[str, Inspection]:
    policies = run.header.get("policies", {})
    if not policies:
        raise fail("the run names no policies", where=str(run.folder), remedy="leave --depth out")
    base = located(str(run.header["base"]["path"]), run.folder)
    options = run.header.get("options", {})
    how = {name: options.get(name) for name in ("layers", "tower")}
    return {name: inspect(located(str(policy["path"]), run.folder), base, **how) for name, policy in policies.items()}

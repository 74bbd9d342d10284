"""The verb `report`: a run folder's numbers, tables and figure, written into its `report/` folder."""

from __future__ import annotations

import os
from pathlib import Path

from rewarded_lines.evaluation.records import load_run, write_json
from rewarded_lines.drawing.fronts import figure_bytes, front_figure
from rewarded_lines.summaries.summary import Summary, summarise
from rewarded_lines.summaries.tables import markdown, points_csv

FILES = ("summary.json", "table.md", "points.csv", "front.png", "front.svg")


def report(run: Path | str, *more: Path | str) -> Summary:
    """Summarise a run and write `FILES` into the `report/` folder in it.

    An unfinished run is summarised on the points it has. Every file is replaced whole; the numbers are
    written before the figure is drawn.

    Args:
        run: the folder that `sweep` wrote.
        more: runs of the same project with policies of other training seeds; all are averaged, and training is a
            second level of the bootstrap.

    Returns:
        What summary.json holds.

    Raises:
        UserError: the folder is no run or its points cannot be compared; or matplotlib is not installed.
    """
    read, *others = (load_run(folder) for folder in (run, *more))
    summary = summarise([read, *others])
    folder = read.folder / "report"
    write_json(folder / "summary.json", summary.as_dict())
    _write(folder / "table.md", markdown(summary).encode())
    _write(folder / "points.csv", points_csv(summary).encode())
    figure = front_figure(summary)
    for kind in ("png", "svg"):
        _write(folder / f"front.{kind}", figure_bytes(figure, kind))
    return summary


def _write(path: Path, content: bytes) -> None:
    """Write a file so that readers see the old one or the new one, never half of either."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_bytes(content)
    os.replace(partial, path)

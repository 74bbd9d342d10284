"""The tables of a summary: cells made once, shown on a terminal with rich, as Markdown, or as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

from rich import box
from rich.console import Console, ConsoleOptions, JustifyMethod, RenderableType, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from rewarded_lines.config import SFT
from rewarded_lines.reports.summary import Summary
from rewarded_lines.reports.texts import (
    bracketed,
    plus_minus,
    points_note,
    reference_text,
    scope_note,
    volume_unit,
    weights_text,
    with_unit,
)

# With more methods than this, the differences above every reference would fill a screen.
_FEW = 3


@dataclass(frozen=True)
class Sheet:
    """A table that fits itself to a terminal: `console.print(sheet)` shows its title, its rows and its note.

    On a terminal that is too narrow methods become headings, and columns that still find no room go to another table: a
    number is never cut in two.

    Attributes:
        title: above the table.
        headings: of the columns.
        rows: of cells.
        note: what the numbers are.
        labels: how many of the first columns name a row.
    """

    title: str
    headings: tuple[str, ...]
    rows: list[tuple[str, ...]]
    note: str = ""
    labels: int = 1

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield what rich prints."""
        yield Text(self.title, style="bold")
        yield from self._tables(options.max_width)
        yield Text(self.note + "\n", style="dim")

    @cached_property
    def _widths(self) -> list[int]:
        """The least width of each column: headings may be folded between words, cells not."""
        columns = zip(self.headings, *self.rows, strict=True)
        return [max(*map(len, cells), *map(len, head.split() or [""])) for head, *cells in columns]

    @cached_property
    def _grouped(self) -> bool:
        return len({row[0] for row in self.rows}) < len(self.rows)

    def _tables(self, width: int) -> Iterator[RenderableType]:
        every = list(range(len(self._widths)))
        if self._room(every) <= width:
            yield self._table(every, self.rows)
            return
        headed = self._grouped and self.labels > 1
        for part in self._parts(every[1 if headed else 0 : self.labels], every[self.labels :], width):
            yield from self._headed(part) if headed else [self._table(part, self.rows)]

    def _headed(self, columns: list[int]) -> Iterator[RenderableType]:
        """Yield a table whose rows stand below the first of their labels."""
        yield ""
        yield Padding(self._table(columns, [], alone=False), (0, 1), expand=False)
        for name, rows in groupby(self.rows, key=lambda row: row[0]):
            yield Text(f" {name}", style="bold")
            yield Padding(self._table(columns, list(rows), alone=False), (0, 1), expand=False)
        yield ""

    def _parts(self, labels: list[int], columns: list[int], width: int) -> list[list[int]]:
        """Return the columns of each table: as many as fit, the labels before them."""
        parts = [list(labels)]
        for column in columns:
            if len(parts[-1]) > len(labels) and self._room([*parts[-1], column]) > width:
                parts.append(list(labels))
            parts[-1].append(column)
        return parts

    def _room(self, columns: list[int]) -> int:
        """Return the least width of a table: a space after each cell, and one for each line between."""
        return sum(self._widths[column] + 2 for column in columns) + 1

    def _table(self, columns: list[int], rows: list[tuple[str, ...]], alone: bool = True) -> Table:
        """Return a table of some columns.

        Args:
            columns: by their indices.
            rows: whole ones.
            alone: False for one of several tables, which have fixed widths, and either a head or rows.
        """
        # Text, not str: rich would take the unit "[logit]" for its own markup.
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_header=alone or not rows, show_edge=alone)
        for column in columns:
            least = self._widths[column]
            side: JustifyMethod = "left" if column == 0 else "right"
            heading, most = Text(self.headings[column]), None if alone else least
            table.add_column(heading, justify=side, overflow="fold", min_width=least, max_width=most)
        for _, group in groupby(rows, key=lambda row: row[0]):
            together = list(group)
            for row in together:
                ends = alone and self._grouped and row is together[-1]
                table.add_row(*(Text(row[column]) for column in columns), end_section=ends)
        return table


def sheets(summary: Summary, brief: bool = False) -> list[Sheet]:
    """Return the tables that have rows: points, hypervolumes, differences, policies against SFT, other measures.

    Args:
        summary: the numbers.
        brief: of more than three methods, show the differences above SFT only.
    """
    made = [
        points_sheet(summary),
        hypervolume_sheet(summary),
        difference_sheet(summary, brief and len(summary.methods()) > _FEW),
        policy_sheet(summary),
        side_sheet(summary),
    ]
    return [sheet for sheet in made if sheet.rows]


def points_sheet(summary: Summary) -> Sheet:
    """Return every point's mean scores, KL and length, each ± half the width of its interval."""
    points = summary.points
    columns = [
        (with_unit(name, unit), plus_minus(point.rewards[name] for point in points))
        for name, unit in summary.objectives.items()
    ]
    columns.append(("KL [nats]", plus_minus(point.kl for point in points)))
    columns.append(("words", plus_minus(point.words for point in points)))
    columns.append(("ended", [f"{point.ended:.0%}" for point in points]))
    return _by_point("Points", summary, columns, points_note(summary))


def side_sheet(summary: Summary) -> Sheet:
    """Return what else is measured at every point: audits, forgetting, diversity, its share of the hypervolume."""
    points = summary.points
    columns = [
        (with_unit(f"audit {name}", summary.rewards[name]), plus_minus(point.rewards[name] for point in points))
        for name in summary.audits
    ]
    # Over SFT's, paired by text: texts differ far more than models, and would hide what was forgotten.
    columns += [
        (f"{name} perplexity ÷ SFT", plus_minus(point.forgetting[name] for point in points))
        for name in summary.controls
    ]
    columns.append(("distinct-2", [f"{point.distinct2:.2f}" for point in points]))
    columns.append(("adds", [f"{point.contribution:.3g}" for point in points]))
    note = (
        "distinct-2: different pairs of words among all pairs. adds: what its method's hypervolume above SFT would "
        "lose without the point."
    )
    if summary.audits:
        note += " audit: rewards that nothing was trained on or chosen by."
    if summary.controls:
        of_sft = ", ".join(f"{one.value:.3g} ({name})" for name, one in summary.sft.perplexities.items())
        note += f" perplexity: of texts of no task, SFT's is {of_sft}; above 1 is forgotten, ± paired by text."
    return _by_point("Beside the front", summary, columns, note)


def _by_point(title: str, summary: Summary, columns: Sequence[tuple[str, Sequence[str]]], note: str) -> Sheet:
    """Return a table with a row for every point, from the heading and the cells of each column."""
    headings = ("method", "λ", *(heading for heading, _ in columns))
    names = ((point.method, weights_text(point)) for point in summary.points)
    cells = zip(*(cells for _, cells in columns), strict=True)
    return Sheet(title, headings, [(*name, *row) for name, row in zip(names, cells, strict=True)], note, labels=2)


def hypervolume_sheet(summary: Summary) -> Sheet:
    """Return each method's hypervolume above each reference, the reference's coordinates beside it."""
    rows = summary.hypervolumes
    cells = bracketed([row.hypervolume for row in rows])
    places = [(row.method, row.reference, reference_text(summary, row.reference)) for row in rows]
    return Sheet(
        f"Hypervolume [{volume_unit(summary)}]",
        ("method", "reference", "at", "hypervolume"),
        [(*place, cell) for place, cell in zip(places, cells, strict=True)],
        f"Higher is better. at: the reference's coordinates ({', '.join(summary.objectives)}). sft: the SFT "
        "model's mean scores, so that only what beats SFT on every reward counts. worst: the worst mean "
        "score of any point on each axis. Both come from the points' own prompts, anew in each resample"
        + ("; others are as declared. " if len(summary.references) > 2 else ". ")
        + "Noise in the means raises hypervolumes, in resamples more, so compare methods by their difference.",
        labels=2,
    )


def difference_sheet(summary: Summary, brief: bool = False) -> Sheet:
    """Return the difference between the hypervolumes of each pair of methods.

    Args:
        summary: the numbers.
        brief: above the SFT model's scores only.
    """
    differences = [row for row in summary.differences if row.reference == SFT or not brief]
    rows: list[tuple[str, ...]] = []
    for row, cell in zip(differences, bracketed([row.difference for row in differences]), strict=True):
        relative = "–" if row.relative is None else f"{row.relative:+.0%}"
        rows.append((f"{row.method} − {row.other}", row.reference, cell, relative, f"{row.share_positive:.1%}"))
    return Sheet(
        f"Difference in hypervolume [{volume_unit(summary)}]",
        ("methods", "reference", "difference", "relative", "above 0 in"),
        rows,
        "Paired by prompt. above 0 in: the share of resamples where the first method has the larger one."
        + (" Above the other references: report/table.md." if brief else ""),
    )


def policy_sheet(summary: Summary) -> Sheet:
    """Return what each policy, unmerged, gains over the SFT model on every reward."""
    gains = summary.policy_gains
    columns = [bracketed([gain.rewards[name] for gain in gains]) for name in summary.rewards]
    return Sheet(
        "Policies against SFT",
        ("policy", *(with_unit(f"Δ {name}", unit) for name, unit in summary.rewards.items())),
        [(gain.policy, *cells) for gain, *cells in zip(gains, *columns, strict=True)],
        "Mean score of the policy itself minus that of SFT, paired by prompt.",
    )


def markdown(summary: Summary) -> str:
    """Return all tables as one Markdown text."""
    parts = [f"# {_escape(summary.title) or 'Front'}", scope_note(summary)]
    for sheet in sheets(summary):
        ruler = [":--", *["--:"] * (len(sheet.headings) - 1)]
        lines = [f"| {' | '.join(map(_escape, cells))} |" for cells in (sheet.headings, ruler, *sheet.rows)]
        parts.append("\n".join([f"## {sheet.title}", "", *lines, "", sheet.note]))
    return "\n\n".join(parts) + "\n"


def points_csv(summary: Summary) -> str:
    """Return one line per point with unrounded numbers: NAME, NAME.low and NAME.high for every measure."""
    schedule, shares = ["method", "checkpoint", "merge", "alpha", "beta"], ["ended", "distinct2", "contribution"]
    measures = ["kl", "words", *(f"{name} perplexity" for name in summary.controls)]
    measures += [f"{name} perplexity over SFT" for name in summary.controls]
    # A reward may have the name of a column that every table has.
    rewards = [f"reward {name}" if name in (*schedule, *measures, *shares) else name for name in summary.rewards]
    heading = [*schedule, *(f"weight.{policy}" for policy in summary.policies)]
    heading += [f"{measure}{end}" for measure in (*rewards, *measures) for end in ("", ".low", ".high")]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*heading, *shares])
    for point in summary.points:
        weights = point.merge.weights or ("",) * len(summary.policies)
        estimates = [*point.rewards.values(), point.kl, point.words, *point.perplexities.values()]
        estimates += point.forgetting.values()
        numbers = [number for one in estimates for number in (one.value, one.low, one.high)]
        place = [point.method, point.checkpoint, point.merge.method, point.merge.alpha, point.merge.beta]
        writer.writerow([*place, *weights, *numbers, point.ended, point.distinct2, point.contribution])
    return text.getvalue()


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")

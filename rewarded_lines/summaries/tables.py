"""The tables of a summary: cells made once, shown on a terminal with rich, as Markdown, or as CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from rich import box
from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderableType, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from rewarded_lines.config import SFT
from rewarded_lines.fronts.intervals import Estimate
from rewarded_lines.summaries.summary import PointSummary, Summary

# With more methods than this, their pairs fill a screen for every reference.
_FEW = 3


@dataclass(frozen=True)
class Sheet:
    """A table before it is drawn: the first columns, `labels` of them, name a row; `note` says what the numbers are."""

    title: str
    headings: tuple[str, ...]
    rows: list[tuple[str, ...]]
    note: str = ""
    labels: int = 1


def sheets(summary: Summary, brief: bool = False) -> list[Sheet]:
    """Return the tables that have rows: points, hypervolumes, differences, policies against SFT, and the rest.

    Args:
        summary: the numbers.
        brief: of many methods' differences show those above SFT only.
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
    columns = [_plus_minus([point.rewards[name] for point in points]) for name in summary.objectives]
    columns += [_plus_minus([point.kl for point in points]), _plus_minus([point.words for point in points])]
    headings = [with_unit(name, unit) for name, unit in summary.objectives.items()]
    return Sheet(
        "Points",
        ("method", "λ", *headings, "KL [nats]", "words", "ended"),
        [
            (point.method, weights_text(point), *cells, f"{point.ended:.0%}")
            for point, *cells in zip(points, *columns, strict=True)
        ],
        _points_note(summary),
        labels=2,
    )


def side_sheet(summary: Summary) -> Sheet:
    """Return what else is measured at every point: audits, forgetting, diversity, its share of the hypervolume."""
    points = summary.points
    headings, columns = [], []
    for name in summary.audits:
        headings.append(with_unit(f"audit {name}", summary.rewards[name]))
        columns.append(_plus_minus([point.rewards[name] for point in points]))
    for name in summary.controls:
        # Over SFT's, paired by text: texts differ far more than models, and would hide what was forgotten.
        headings.append(f"{name} perplexity ÷ SFT")
        columns.append(_plus_minus([point.forgetting[name] for point in points]))
    columns.append([f"{point.distinct2:.2f}" for point in points])
    columns.append([f"{point.contribution:.3g}" for point in points])
    return Sheet(
        "Beside the front",
        ("method", "λ", *headings, "distinct-2", "adds"),
        [(point.method, weights_text(point), *cells) for point, *cells in zip(points, *columns, strict=True)],
        "distinct-2: different pairs of words among all pairs. adds: what its method's hypervolume above SFT would "
        "lose without the point."
        + (" audit: rewards that nothing was trained on or chosen by." if summary.audits else "")
        + (_perplexity_note(summary) if summary.controls else ""),
        labels=2,
    )


def _perplexity_note(summary: Summary) -> str:
    of_sft = ", ".join(f"{one.value:.3g} ({name})" for name, one in summary.sft.perplexities.items())
    return f" perplexity: of texts of no task, SFT's is {of_sft}; above 1 is forgotten, ± paired by text."


def hypervolume_sheet(summary: Summary) -> Sheet:
    """Return each method's hypervolume above each reference, the reference's coordinates beside it."""
    cells = _bracketed([row.hypervolume for row in summary.hypervolumes])
    return Sheet(
        f"Hypervolume [{volume_unit(summary)}]",
        ("method", "reference", "at", "hypervolume"),
        [
            (row.method, row.reference, reference_text(summary, row.reference), cell)
            for row, cell in zip(summary.hypervolumes, cells, strict=True)
        ],
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
    cells = _bracketed([row.difference for row in differences])
    return Sheet(
        f"Difference in hypervolume [{volume_unit(summary)}]",
        ("methods", "reference", "difference", "relative", "above 0 in"),
        [
            (
                f"{row.method} − {row.other}",
                row.reference,
                cell,
                "–" if row.relative is None else f"{row.relative:+.0%}",
                f"{row.share_positive:.1%}",
            )
            for row, cell in zip(differences, cells, strict=True)
        ],
        "Paired by prompt. above 0 in: the share of resamples where the first method has the larger one."
        + (" Above the other references: report/table.md." if brief else ""),
    )


def policy_sheet(summary: Summary) -> Sheet:
    """Return what each policy, unmerged, gains over the SFT model on every reward."""
    columns = [_bracketed([row.rewards[name] for row in summary.policy_gains]) for name in summary.rewards]
    return Sheet(
        "Policies against SFT",
        ("policy", *(with_unit(f"Δ {name}", unit) for name, unit in summary.rewards.items())),
        [(row.policy, *cells) for row, *cells in zip(summary.policy_gains, *columns, strict=True)],
        "Mean score of the policy itself minus that of SFT, paired by prompt.",
    )


def rich_table(sheet: Sheet) -> ConsoleRenderable:
    """Return a sheet for the terminal, its title above and its note below.

    Where it is too wide, methods become headings, and columns that still find no room another table: a number is never
    cut in two.
    """
    return _Fitted(sheet)


class _Fitted:
    """A sheet that takes the width that it is given."""

    def __init__(self, sheet: Sheet) -> None:
        self._sheet = sheet
        # Headings may be folded between words, cells not.
        columns = zip(sheet.headings, *sheet.rows, strict=True)
        self._widths = [max(*map(len, cells), *map(len, head.split() or [""])) for head, *cells in columns]
        self._grouped = len({row[0] for row in sheet.rows}) < len(sheet.rows)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(self._sheet.title, style="bold")
        yield from self._tables(options.max_width)
        yield Text(self._sheet.note + "\n", style="dim")

    def _tables(self, width: int) -> Iterator[RenderableType]:
        every, rows, count = list(range(len(self._widths))), self._sheet.rows, self._sheet.labels
        if self._room(every) <= width:
            yield self._table(every, rows)
            return
        headed = self._grouped and count > 1
        for part in self._parts(every[1 if headed else 0 : count], every[count:], width):
            yield from self._headed(part) if headed else [self._table(part, rows)]

    def _headed(self, columns: list[int]) -> Iterator[RenderableType]:
        """Yield a table whose rows stand below the first of their labels."""
        yield ""
        yield Padding(self._table(columns, [], alone=False), (0, 1), expand=False)
        for name, rows in groupby(self._sheet.rows, key=lambda row: row[0]):
            yield Text(f" {name}", style="bold")
            yield Padding(self._table(columns, list(rows), alone=False), (0, 1), expand=False)
        yield ""

    def _parts(self, labels: list[int], columns: list[int], width: int) -> list[list[int]]:
        """Return which columns stand together, the labels before each."""
        parts = [list(labels)]
        for column in columns:
            if len(parts[-1]) > len(labels) and self._room([*parts[-1], column]) > width:
                parts.append(list(labels))
            parts[-1].append(column)
        return parts

    def _room(self, columns: list[int]) -> int:
        """Return how wide a table is at least: a space after each cell, and one for each line between."""
        return sum(self._widths[column] + 2 for column in columns) + 1

    def _table(self, columns: list[int], rows: list[tuple[str, ...]], alone: bool = True) -> Table:
        """Return some columns; not `alone` they are exactly as wide as in every other part, and have a head or rows."""
        # Text, not str: "[logit]" is a unit here, and would be taken for rich's markup.
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_header=alone or not rows, show_edge=alone)
        for column in columns:
            table.add_column(
                Text(self._sheet.headings[column]),
                justify="left" if column == 0 else "right",
                overflow="fold",
                min_width=self._widths[column],
                max_width=None if alone else self._widths[column],
            )
        for _, group in groupby(rows, key=lambda row: row[0]):
            together = list(group)
            for row in together:
                ends = alone and self._grouped and row is together[-1]
                table.add_row(*(Text(row[column]) for column in columns), end_section=ends)
        return table


def markdown(summary: Summary) -> str:
    """Return all tables as one Markdown text."""
    parts = [f"# {_escape(summary.title) or 'Front'}", scope_note(summary)]
    for sheet in sheets(summary):
        lines = [f"## {sheet.title}", "", _line(sheet.headings)]
        lines.append(_line([":--", *["--:"] * (len(sheet.headings) - 1)]))
        lines += [_line(row) for row in sheet.rows]
        parts.append("\n".join([*lines, "", sheet.note]))
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
    heading += shares
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(heading)
    for point in summary.points:
        weights = point.merge.weights or ("",) * len(summary.policies)
        estimates = [*point.rewards.values(), point.kl, point.words, *point.perplexities.values()]
        estimates += point.forgetting.values()
        numbers = [number for one in estimates for number in (one.value, one.low, one.high)]
        place = [point.method, point.checkpoint, point.merge.method, point.merge.alpha, point.merge.beta]
        writer.writerow([*place, *weights, *numbers, point.ended, point.distinct2, point.contribution])
    return text.getvalue()


def scope_note(summary: Summary) -> str:
    """Return what the intervals cover, and whether points are still missing."""
    over = (
        f"{summary.prompts} prompts"
        if summary.runs == 1
        else f"{summary.runs} training runs and {summary.prompts} prompts"
    )
    note = (
        f"{summary.level:.0%} intervals: percentile bootstrap over {over}, "
        f"{summary.resamples} resamples, seed {summary.seed}. "
    )
    note += (
        "They do not cover another training run."
        if summary.runs == 1
        else "Means and hypervolumes are averages over the runs; so few make intervals rather too narrow."
    )
    if summary.tuned:
        found = summary.tuned
        note += (
            f" tuned: α = {found['alpha']:g}, β = {found['beta']:g}, chosen in {len(found['trials'])} trials on "
            f"{found['prompts']['count']} validation prompts."
        )
    if summary.missing_points:
        total = len(summary.points) + summary.missing_points
        where = "evaluated yet" if summary.runs == 1 else "in every run"
        note += f" {summary.missing_points} of {total} points are not {where}."
    return note


def with_unit(name: str, unit: str) -> str:
    """Return a measure's name with its unit, if it has one."""
    return f"{name} [{unit}]" if unit else name


def weights_text(point: PointSummary) -> str:
    """Return λ of two policies, the weights of more, the name of a model that stands for itself, or nothing for SFT."""
    if point.checkpoint:
        return point.checkpoint
    return _weight(point.weights[0]) if len(point.weights) == 2 else ",".join(map(_weight, point.weights))


def _weight(weight: float) -> str:
    return f"{weight:.2f}" if round(weight, 2) == round(weight, 4) else f"{weight:.4f}".rstrip("0")


def volume_unit(summary: Summary) -> str:
    """Return the product of the rewards' units; a reward's own name stands for a unit not declared."""
    return " × ".join(unit or name for name, unit in summary.objectives.items())


def reference_text(summary: Summary, reference: str) -> str:
    """Return the coordinates of a reference point, in the order of the rewards."""
    return "(" + ", ".join(f"{value:.3g}" for value in summary.references[reference].values()) + ")"


def interval_text(estimate: Estimate) -> str:
    """Return `value [low, high]` with as many decimals as the interval deserves."""
    return _bracketed([estimate])[0]


def _bracketed(estimates: Sequence[Estimate]) -> list[str]:
    places = _decimals(estimates)
    return [f"{_fixed(e.value, places)} [{_fixed(e.low, places)}, {_fixed(e.high, places)}]" for e in estimates]


def _plus_minus(estimates: Sequence[Estimate]) -> list[str]:
    places = _decimals(estimates)
    return [f"{_fixed(e.value, places)} ±{(e.high - e.low) / 2:.{places}f}" for e in estimates]


def _fixed(value: float, places: int) -> str:
    """Return a number that never reads −0.00."""
    return f"{round(value, places) + 0.0:.{places}f}"


def _decimals(estimates: Iterable[Estimate]) -> int:
    """Return the decimals at which the middle half-width of a column's intervals shows two digits."""
    widths = sorted((e.high - e.low) / 2 for e in estimates if e.high > e.low)
    if not widths:
        return 2
    return min(6, max(0, 1 - math.floor(math.log10(widths[len(widths) // 2]))))


def _points_note(summary: Summary) -> str:
    note = "± is half the interval's width; all points share their prompts, so differences are surer than that."
    if len(summary.policies) == 2:
        note = f"λ: weight of {summary.policies[0]}, 1 − λ that of {summary.policies[1]}. " + note
    elif len(summary.policies) == 1:
        edited = any(point.edit for point in summary.points)
        note = (f"λ: weight of {summary.policies[0]}" + ("; of `edit` α, and β = 1 − α. " if edited else ". ")) + note
    elif len(summary.policies) > 2:
        note = f"λ: weights of {', '.join(summary.policies)}. " + note
    note += " KL: mean of log π(y|x) − log π_SFT(y|x)"
    settings = {name: summary.generation.get(name, 1.0) for name in ("temperature", "top_p")}
    if any(value != 1.0 for value in settings.values()):
        sampled = ", ".join(f"{name} {value:g}" for name, value in settings.items())
        note += f" of responses sampled at {sampled}, where it is not an unbiased estimate of KL(π‖π_SFT)"
    return note + "."


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(_escape(cell) for cell in cells) + " |"

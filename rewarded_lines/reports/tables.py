"""The tables of a summary, for a terminal, as Markdown and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from rewarded_lines.config import SFT
from rewarded_lines.reports import texts
from rewarded_lines.reports.requested_tables import kl_difference_sheet, kl_sheet, power_sheet
from rewarded_lines.reports.sheet import Sheet
from rewarded_lines.reports.summary import Summary

# With more methods, the differences above all references fill a screen.
_FEW = 3
# Characters in a row of a Markdown table; the rest goes to another table.
_WIDEST = 150


def sheets(summary: Summary, brief: bool = False) -> list[Sheet]:
    """Return all tables with rows; `brief` shortens the differences of more than three methods."""
    first = [points_sheet(summary), hypervolume_sheet(summary)]
    differences = difference_sheet(summary, brief and len(summary.methods()) > _FEW)
    within = [kl_sheet(summary), kl_difference_sheet(summary, brief)] if summary.kl_budgets else []
    power = [power_sheet(summary, brief)] if summary.power else []
    every = [*first, differences, *within, *power, policy_sheet(summary), side_sheet(summary)]
    return [sheet for sheet in every if sheet.rows]


def points_sheet(summary: Summary) -> Sheet:
    """Return the mean scores, KL and length of every point."""
    points = summary.points
    columns = [
        (texts.with_unit(name, unit), texts.plus_minus(point.rewards[name] for point in points))
        for name, unit in summary.objectives.items()
    ]
    columns.append(("KL [nats]", texts.plus_minus(point.kl for point in points)))
    columns.append(("words", texts.plus_minus(point.words for point in points)))
    columns.append(("ended", [f"{point.ended:.0%}" for point in points]))
    return _by_point("Points", summary, columns, texts.points_note(summary))


def side_sheet(summary: Summary) -> Sheet:
    """Return the audits, forgetting, diversity and hypervolume contribution of every point."""
    points = summary.points
    columns = [
        (
            texts.with_unit(f"audit {name}", summary.rewards[name]),
            texts.plus_minus(point.rewards[name] for point in points),
        )
        for name in summary.audits
    ]
    # Paired with SFT by text: texts differ more than models, which would hide forgetting.
    columns += [
        (f"{name} perplexity ÷ SFT", texts.plus_minus(point.forgetting[name] for point in points))
        for name in summary.controls
    ]
    columns.append(("distinct-2", [f"{point.distinct2:.2f}" for point in points]))
    columns.append(("adds", [f"{point.contribution:.3g}" for point in points]))
    note = (
        "distinct-2: different pairs of words among all pairs. "
        "adds: what its method's hypervolume above SFT would lose without the point."
    )
    if not summary.exact_contributions:
        note += " It is approximated, to about a seventh of the largest."
    if summary.audits:
        note += " audit: rewards that nothing was trained on or chosen by."
    if summary.controls:
        sft = summary.sft.perplexities.items()
        of_sft = ", ".join(f"{one.value:.3g} ({name})" for name, one in sft)
        note += f" perplexity: of texts of no task, SFT's is {of_sft}; "
        note += "above 1 is forgotten, ± paired by text."
    return _by_point("Beside the front", summary, columns, note)


def _by_point(title: str, summary: Summary, columns: Sequence[tuple[str, Sequence[str]]], note: str) -> Sheet:
    """Return a table with a row for every point from the (heading, cells) of each column."""
    if any(point.preference for point in summary.points):
        columns = [("μ", [texts.shares_text(tuple(point.preference.values())) for point in summary.points]), *columns]
    headings = ("method", "λ", *(heading for heading, _ in columns))
    methods = [point.method for point in summary.points]
    rows = zip(
        methods,
        [texts.weights_text(point, summary.policies) for point in summary.points],
        *(cells for _, cells in columns),
        strict=True,
    )
    return Sheet(title, headings, list(rows), note, labels=2)


def hypervolume_sheet(summary: Summary) -> Sheet:
    """Return each method's hypervolume above each reference, with the reference's coordinates."""
    rows = summary.hypervolumes
    cells = texts.bracketed([row.hypervolume for row in rows])
    places = [(row.method, row.reference, texts.reference_text(summary, row.reference)) for row in rows]
    return Sheet(
        f"Hypervolume [{texts.volume_unit(summary)}]",
        ("method", "reference", "at", "hypervolume"),
        [(*place, cell) for place, cell in zip(places, cells, strict=True)],
        f"Higher is better. at: the reference's coordinates ({', '.join(summary.objectives)}). "
        "sft: the SFT model's mean scores, so that only what beats SFT on every reward counts. "
        "worst: the worst mean score of any point on each axis. "
        "Both come from the points' own prompts, anew in each resample"
        + ("; others are as declared. " if len(summary.references) > 2 else ". ")
        + "Noise in the means raises hypervolumes, in resamples more, so compare methods by their difference."
        + texts.accuracy_note(summary)
        + texts.constant_note(summary),
        labels=2,
    )


def difference_sheet(summary: Summary, brief: bool = False) -> Sheet:
    """Return the hypervolume differences of each pair of methods; `brief` keeps those above SFT."""
    differences = [row for row in summary.differences if row.reference == SFT or not brief]
    cells = texts.bracketed([row.difference for row in differences])
    rows: list[tuple[str, ...]] = []
    for row, cell in zip(differences, cells, strict=True):
        pair = (f"{row.method} − {row.other}", row.reference)
        relative = "–" if row.relative is None else f"{row.relative:+.0%}"
        rows.append((*pair, cell, relative, f"{row.share_positive:.1%}"))
    return Sheet(
        f"Difference in hypervolume [{texts.volume_unit(summary)}]",
        ("methods", "reference", "difference", "relative", "above 0 in"),
        rows,
        "Paired by prompt. above 0 in: the share of resamples where the first method has the larger one."
        + (" Above the other references: report/table.md." if brief else ""),
    )


def policy_sheet(summary: Summary) -> Sheet:
    """Return the gain of each unmerged policy over SFT for every reward."""
    gains = summary.policy_gains
    columns = [texts.bracketed([gain.rewards[name] for gain in gains]) for name in summary.rewards]
    return Sheet(
        "Policies against SFT",
        ("policy", *(texts.with_unit(f"Δ {name}", unit) for name, unit in summary.rewards.items())),
        [(gain.policy, *cells) for gain, *cells in zip(gains, *columns, strict=True)],
        "Mean score of the policy itself minus that of SFT, paired by prompt.",
    )


def markdown(summary: Summary) -> str:
    """Return all tables as one Markdown text."""
    parts = [f"# {_escape(summary.title) or 'Front'}", texts.scope_note(summary)]
    for sheet in sheets(summary):
        tables = [_markdown_table(sheet, columns) for columns in sheet.columns(_WIDEST)]
        parts.append("\n\n".join([f"## {sheet.title}", *tables, sheet.note]))
    return "\n\n".join(parts) + "\n"


def _markdown_table(sheet: Sheet, columns: Sequence[int]) -> str:
    ruler = [":--", *["--:"] * (len(columns) - 1)]
    rows = ([row[column] for column in columns] for row in (sheet.headings, *sheet.rows))
    head, *cells = (f"| {' | '.join(map(_escape, row))} |" for row in rows)
    return "\n".join([head, f"| {' | '.join(ruler)} |", *cells])


def points_csv(summary: Summary) -> str:
    """Return unrounded numbers as CSV, a line per point: NAME, NAME.low, NAME.high per measure.

    NAME.missing counts responses without a score, for each reward that lacks some.
    """
    own = any(point.merge.schedule.forms for point in summary.points)
    schedule = ["method", "checkpoint", "merge", "alpha", "beta", *(["schedule"] if own else [])]
    parts = ["ended", "distinct2", "contribution"]
    measures = ["kl", "words", *(f"{name} perplexity" for name in summary.controls)]
    measures += [f"{name} perplexity over SFT" for name in summary.controls]
    # A reward may have the name of another column.
    used = {*schedule, *measures, *parts}
    rewards = [f"reward {name}" if name in used else name for name in summary.rewards]
    asked = next((list(point.preference) for point in summary.points if point.preference), [])
    heading = [*schedule, *(f"weight.{policy}" for policy in summary.policies)]
    heading += [f"preference.{reward}" for reward in asked]
    for measure in (*rewards, *measures):
        heading += [measure, f"{measure}.low", f"{measure}.high"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*heading, *parts, *(f"{name}.missing" for name in summary.missing)])
    for point in summary.points:
        weights = point.merge.weights or ("",) * len(summary.policies)
        estimates = [*point.rewards.values(), point.kl, point.words, *point.perplexities.values()]
        estimates += point.forgetting.values()
        numbers = [number for one in estimates for number in (one.value, one.low, one.high)]
        ends = ["", ""] if point.merge.lines else [point.merge.alpha, point.merge.beta]
        place = [point.method, point.checkpoint, point.merge.method, *ends]
        place += [point.merge.schedule.text(summary.policies)] if own else []
        without = [point.missing[name].count if name in point.missing else 0 for name in summary.missing]
        shares = [point.preference.get(reward, "") for reward in asked]
        writer.writerow(
            [*place, *weights, *shares, *numbers, point.ended, point.distinct2, point.contribution, *without]
        )
    return text.getvalue()


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")

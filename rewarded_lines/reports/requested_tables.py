"""The tables that a report has only on request: at equal KL, and what the run could find."""

from __future__ import annotations

from collections.abc import Sequence

from rewarded_lines.config import SFT
from rewarded_lines.pareto.bootstrap import Estimate
from rewarded_lines.pareto.power import FACTOR
from rewarded_lines.reports import texts
from rewarded_lines.reports.detectable import Detectable
from rewarded_lines.reports.kl_budgets import KlBudget
from rewarded_lines.reports.sheet import Sheet
from rewarded_lines.reports.summary import Summary

# In a terminal.
_MOST_SENTENCES = 6


def kl_sheet(summary: Summary) -> Sheet:
    """Return the hypervolume above SFT of each family of methods at equal KL."""
    budgets = summary.kl_budgets
    names = [row.method for row in budgets[0].hypervolumes]
    columns = [_starred(one, [([row.method], row.hypervolume) for row in one.hypervolumes]) for one in budgets]
    return Sheet(
        f"Hypervolume above SFT at equal KL [{texts.volume_unit(summary)}]",
        ("methods", *_within(summary)),
        list(zip(names, *columns, strict=True)),
        "Methods that differ only in the length of their step share a row. A point beyond the limit lets SFT answer "
        "part of the prompts, drawn by lot, so that its mean KL is the limit; no score is interpolated between merges."
        + _unfair(summary),
    )


def kl_difference_sheet(summary: Summary, brief: bool = False) -> Sheet:
    """Return the differences of `kl_sheet`; `brief` keeps those to the first family."""
    budgets = summary.kl_budgets
    first = budgets[0].hypervolumes[0].method
    kept = [[row for row in one.differences if not brief or row.other == first] for one in budgets]
    names = [f"({row.method}) − ({row.other})" for row in kept[0]]
    columns = [
        _starred(one, [([row.method, row.other], row.difference) for row in rows])
        for one, rows in zip(budgets, kept, strict=True)
    ]
    return Sheet(
        f"Difference at equal KL [{texts.volume_unit(summary)}]",
        ("methods", *_within(summary)),
        list(zip(names, *columns, strict=True)),
        "Paired by prompt." + (" All pairs: report/table.md." if brief else "") + _unfair(summary),
    )


def _starred(budget: KlBudget, rows: Sequence[tuple[Sequence[str], Estimate]]) -> list[str]:
    """Return estimates with their intervals; a star marks those of a family without a point within the limit."""
    found = texts.bracketed([estimate for _, estimate in rows])
    return [
        cell + (" *" if set(names) & set(budget.beyond) else "") for cell, (names, _) in zip(found, rows, strict=True)
    ]


def _unfair(summary: Summary) -> str:
    """Return what a star means, "" without any."""
    if not any(one.beyond for one in summary.kl_budgets):
        return ""
    return (
        "\n* Not a fair comparison: all points of a family lie beyond the limit, and shorter steps would probably do "
        "better. Add them to the sweep, such as a method with half of α and β."
    )


def _within(summary: Summary) -> list[str]:
    return [f"KL ≤ {one.max_kl:g}" for one in summary.kl_budgets]


def power_sheet(summary: Summary, brief: bool = False) -> Sheet:
    """Return the least difference and the needed numbers of each pair; `brief` keeps hypervolumes above SFT."""
    rows = [row for row in summary.power if not brief or (row.measure, row.at) == ("hypervolume", SFT)]
    several = summary.runs > 1
    headings = ("methods", "measured", "difference", "least", "size", "prompts", *["runs"] * several)
    cells = [_cells(row, several) for row in rows]
    note = (
        "least: the smallest difference that such a run finds with 80% power, "
        f"{FACTOR:.2f} standard errors (two-sided, {1 - summary.level:.0%} level). "
        "prompts: how many find a difference of `size`"
    )
    note += ", with as many runs; runs: how many, with as many prompts. " if several else ". "
    note += "–: no number is enough, or the two are the same. The error of a hypervolume falls about with √prompts."
    if several:
        note += f" The variance between {summary.runs} runs is all but unknown: see the ends of its interval."
    else:
        note += " Another training run may differ by more."
    sentences = [found_sentence(row) for row in rows if not row.found]
    if brief and len(sentences) > _MOST_SENTENCES:
        sentences = [*sentences[:_MOST_SENTENCES], f"{len(sentences) - _MOST_SENTENCES} more: report/table.md."]
    if sentences:
        note += "\nNot found:\n" + "\n".join(f"- {sentence}" for sentence in sentences)
    return Sheet("What the run could find", headings, cells, note, labels=2)


def found_sentence(row: Detectable) -> str:
    """Return how small a difference was bound to be that was not found."""
    seen = texts.interval_text(row.difference)
    what = f"{row.method} − {row.other}, {_measured(row)}: {seen}."
    if not row.standard_error:
        return f"{what} The same in every resample: these prompts cannot say what others would show."
    return f"{what} A difference of {_least(row)} or more would have been found with 80% power."


def _cells(row: Detectable, several: bool) -> tuple[str, ...]:
    methods, difference = f"{row.method} − {row.other}", texts.interval_text(row.difference)
    return (methods, _measured(row), difference, _least(row), texts.two_digits(row.size), *_counts(row, several))


def _least(row: Detectable) -> str:
    """Return the least difference; of several runs with its interval, since so few hardly show how they vary."""
    ends = (row.least.value, row.least.low, row.least.high)
    if not row.standard_error:
        return "–"
    value, low, high = map(texts.two_digits, ends)
    return value if row.variances.seed is None else f"{value} [{low}, {high}]"


def _counts(row: Detectable, several: bool) -> Sequence[str]:
    numbers = (row.prompts_needed, row.runs_needed) if several else (row.prompts_needed,)
    return ["–" if number is None else f"{number:,}" for number in numbers]


def _measured(row: Detectable) -> str:
    return f"above {row.at}" if row.measure == "hypervolume" else f"{row.measure}, {row.at}"

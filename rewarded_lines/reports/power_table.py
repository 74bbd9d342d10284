"""The table of what a run could find, and a sentence for each difference that it did not find.

Apart from the other tables, which no report lacks.
"""

from __future__ import annotations

from collections.abc import Sequence

from rewarded_lines.config import SFT
from rewarded_lines.pareto.power import FACTOR
from rewarded_lines.reports import texts
from rewarded_lines.reports.detectable import Detectable
from rewarded_lines.reports.sheet import Sheet
from rewarded_lines.reports.summary import Summary

# In a terminal.
_MOST_SENTENCES = 6


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

"""The tables of a comparison at equal KL."""

from __future__ import annotations

from rewarded_lines.reports import texts
from rewarded_lines.reports.sheet import Sheet
from rewarded_lines.reports.summary import Summary


def kl_sheet(summary: Summary) -> Sheet:
    """Return the hypervolume above SFT of each family of methods at equal KL."""
    budgets = summary.kl_budgets
    names = [row.method for row in budgets[0].hypervolumes]
    columns = [texts.bracketed([row.hypervolume for row in one.hypervolumes]) for one in budgets]
    return Sheet(
        f"Hypervolume above SFT at equal KL [{texts.volume_unit(summary)}]",
        ("methods", *_within(summary)),
        list(zip(names, *columns, strict=True)),
        "Methods that differ only in the length of their step share a row. A point beyond the limit lets SFT answer "
        "part of the prompts, drawn by lot, so that its mean KL is the limit; no score is interpolated between merges.",
    )


def kl_difference_sheet(summary: Summary, brief: bool = False) -> Sheet:
    """Return the differences of `kl_sheet`; `brief` keeps those to the first family."""
    budgets = summary.kl_budgets
    first = budgets[0].hypervolumes[0].method
    kept = [[row for row in one.differences if not brief or row.other == first] for one in budgets]
    names = [f"({row.method}) − ({row.other})" for row in kept[0]]
    columns = [texts.bracketed([row.difference for row in rows]) for rows in kept]
    return Sheet(
        f"Difference at equal KL [{texts.volume_unit(summary)}]",
        ("methods", *_within(summary)),
        list(zip(names, *columns, strict=True)),
        "Paired by prompt." + (" All pairs: report/table.md." if brief else ""),
    )


def _within(summary: Summary) -> list[str]:
    return [f"KL ≤ {one.max_kl:g}" for one in summary.kl_budgets]

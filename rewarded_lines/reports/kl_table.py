"""The tables of a comparison at equal KL."""

from __future__ import annotations

from collections.abc import Sequence

from rewarded_lines.pareto.bootstrap import Estimate
from rewarded_lines.reports import texts
from rewarded_lines.reports.kl_budgets import KlBudget
from rewarded_lines.reports.sheet import Sheet
from rewarded_lines.reports.summary import Summary


def kl_sheet(summary: Summary) -> Sheet:
    """Return the hypervolume above SFT of each family of methods at equal KL."""
    budgets = summary.kl_budgets
    names = [row.method for row in budgets[0].hypervolumes]
    columns = [_cells(one, [([row.method], row.hypervolume) for row in one.hypervolumes]) for one in budgets]
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
        _cells(one, [([row.method, row.other], row.difference) for row in rows])
        for one, rows in zip(budgets, kept, strict=True)
    ]
    return Sheet(
        f"Difference at equal KL [{texts.volume_unit(summary)}]",
        ("methods", *_within(summary)),
        list(zip(names, *columns, strict=True)),
        "Paired by prompt." + (" All pairs: report/table.md." if brief else "") + _unfair(summary),
    )


def _cells(budget: KlBudget, rows: Sequence[tuple[Sequence[str], Estimate]]) -> list[str]:
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

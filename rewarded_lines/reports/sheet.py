"""A table that adapts to the terminal's width."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, JustifyMethod, RenderableType, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text


@dataclass(frozen=True)
class Sheet:
    """A table that adapts to the terminal's width: `console.print(sheet)`.

    On a narrow terminal methods become headings, and columns without room go to another table.
    A number is never split. `labels` is the number of first columns that name a row.
    """

    title: str
    headings: tuple[str, ...]
    rows: list[tuple[str, ...]]
    note: str = ""
    labels: int = 1

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the title, the tables and the note."""
        yield Text(self.title, style="bold")
        yield from self._tables(options.max_width)
        yield Text(self.note + "\n", style="dim")

    def columns(self, width: int) -> list[list[int]]:
        """Return the columns of each table of at most this width: the labels, then as many as fit."""
        every = list(range(len(self._widths)))
        return self._parts(every[: self.labels], every[self.labels :], width)

    @cached_property
    def _widths(self) -> list[int]:
        """The least width of each column: headings fold between words, cells do not."""
        columns = zip(self.headings, *self.rows, strict=True)
        return [max(map(cell_len, [*cells, *head.split(), ""])) for head, *cells in columns]

    @property
    def _grouped(self) -> bool:
        return len({row[0] for row in self.rows}) < len(self.rows)

    def _tables(self, width: int) -> Iterator[RenderableType]:
        every = list(range(len(self._widths)))
        if self._room(every) <= width:
            yield self._table(every, self.rows, tight=self._whole(every) > width)
            return
        headed = self._grouped and self.labels > 1
        for part in self._parts(every[1 if headed else 0 : self.labels], every[self.labels :], width):
            tight = self._whole(part) > width
            yield from self._headed(part) if headed else [self._table(part, self.rows, tight=tight)]

    def _headed(self, columns: list[int]) -> Iterator[RenderableType]:
        """Yield a table with the first label of its rows as headings."""
        yield ""
        yield Padding(self._table(columns, [], alone=False), (0, 1), expand=False)
        for name, rows in groupby(self.rows, key=lambda row: row[0]):
            yield Text(f" {name}", style="bold")
            yield Padding(self._table(columns, list(rows), alone=False), (0, 1), expand=False)
        yield ""

    def _parts(self, labels: list[int], columns: list[int], width: int) -> list[list[int]]:
        """Return the columns of each table: the labels, then as many as fit."""
        parts = [list(labels)]
        for column in columns:
            if len(parts[-1]) > len(labels) and self._room([*parts[-1], column]) > width:
                parts.append(list(labels))
            parts[-1].append(column)
        return parts

    def _room(self, columns: list[int]) -> int:
        """Return the least width of a table: each cell adds a space and a line."""
        return sum(self._widths[column] + 2 for column in columns) + 1

    def _whole(self, columns: list[int]) -> int:
        """Return the width of a table whose headings are not folded."""
        return self._room(columns) + sum(max(0, cell_len(self.headings[one]) - self._widths[one]) for one in columns)

    def _table(self, columns: list[int], rows: list[tuple[str, ...]], alone: bool = True, tight: bool = False) -> Table:
        """Return a table of some columns; with `alone=False`, one of several of equal widths.

        With `tight` headings are folded: rich narrows the widest columns first, and would drop the last one.
        """
        # Text, not str: rich reads the unit "[logit]" as markup.
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_header=alone or not rows, show_edge=alone)
        for column in columns:
            least = self._widths[column]
            side: JustifyMethod = "left" if column == 0 else "right"
            heading, most = Text(self.headings[column]), None if alone and not tight else least
            table.add_column(heading, justify=side, overflow="fold", min_width=least, max_width=most)
        for _, group in groupby(rows, key=lambda row: row[0]):
            together = list(group)
            for row in together:
                ends = alone and self._grouped and row is together[-1]
                table.add_row(*(Text(row[column]) for column in columns), end_section=ends)
        return table

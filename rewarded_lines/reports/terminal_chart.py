"""The front as a chart of plain characters, for a terminal, a log or a pipe."""

from __future__ import annotations

import math
import string
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from rewarded_lines.reports import texts
from rewarded_lines.reports.summary import PointSummary, Summary

SFT_MARK = "+"
_ROWS = 12
_WIDEST = 100
# Columns that are left to marks: where labels at the left would take them, these are left out.
_FEWEST = 10
# Free space around the marks, as a share of the axis.
_MARGIN = 0.04
_MOST_TICKS = 5
# Means that differ by less, as a share of the largest, are drawn as equal: only rounding tells them apart.
_EQUAL = 1e-6
# Labels show the powers of ten of other numbers. A smaller one than the least has no inverse.
_PLAIN_EXPONENTS, _LEAST_EXPONENT = range(-4, 9), -300
_COLOURS = ("cyan", "magenta", "green", "yellow", "blue", "red")
_LINES, _PLAIN_LINES = tuple("│┤└─┬"), tuple("||+-+")


@dataclass(frozen=True)
class Mark:
    """A character at the means of two rewards."""

    x: float
    y: float
    character: str
    style: str


class _Axis:
    """Maps values to cells, 0 to `cells` − 1, and finds round numbers for its ticks.

    Very large and very small values are divided by a power of ten, which the labels then show.
    """

    def __init__(self, values: Sequence[float], cells: int) -> None:
        largest = max(map(abs, values))
        exponent = math.floor(math.log10(largest)) if largest else 0
        self._exponent = 0 if exponent in _PLAIN_EXPONENTS else max(exponent, _LEAST_EXPONENT)
        self._unit, self._cells = 10.0**self._exponent, cells
        low, high, size = min(values) / self._unit, max(values) / self._unit, largest / self._unit
        margin = _MARGIN * (high - low) if high - low > _EQUAL * size else 0.05 * size or 1.0
        self._low, self._high = low - margin, high + margin

    def cell(self, value: float) -> int:
        return self._place(value / self._unit)

    def _place(self, number: float) -> int:
        return round((number - self._low) / (self._high - self._low) * (self._cells - 1))

    def ticks(self) -> dict[int, str]:
        """Return the labels of the ticks by their cells."""
        least = (self._high - self._low) / _MOST_TICKS
        power = 10.0 ** math.floor(math.log10(least))
        step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least)
        decimals = max(0, -math.floor(math.log10(step)))
        numbers = [number * step for number in range(math.ceil(self._low / step), math.floor(self._high / step) + 1)]
        times = f"e{self._exponent:+03d}" if self._exponent else ""
        return {self._place(number): f"{number + 0.0:.{decimals}f}{times if number else ''}" for number in numbers}


@dataclass(frozen=True)
class FrontChart:
    """The means of two rewards at every point of a run: `console.print(FrontChart(summary))`, in about 20 lines.

    Each method has a letter, each unmerged policy its number, SFT has `+`. Where marks share a cell, SFT is shown, then
    policies, then the method that the project names first. Of more than two rewards the first two are drawn, without
    audits; a run of a single reward has no chart.
    """

    summary: Summary

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield title, axes with marks, and legend."""
        names = list(self.summary.objectives)
        marks = front_marks(self.summary)
        if not marks:
            return
        which = "" if len(names) == 2 else f", the first two of {len(names)} rewards"
        yield Text(f"Mean rewards of every point{which}; better is up and right", style="bold")
        labels = [texts.with_unit(name, self.summary.objectives[name]) for name in names[:2]]
        width = min(options.max_width, _WIDEST)
        yield from _plot(marks, labels, width, _PLAIN_LINES if options.ascii_only else _LINES)
        yield _legend(self.summary, width)


def front_marks(summary: Summary) -> list[Mark]:
    """Return the marks of a summary's first two rewards, those to be drawn over others last."""
    if len(summary.objectives) < 2:
        return []
    letters = _letters(summary.merged_methods())
    marks = []
    for name, points in reversed(summary.merged_methods().items()):
        marks += [_mark(summary, point, *letters[name]) for point in points]
    numbers = _numbers(summary)
    marks += [_mark(summary, point, numbers[name], "bold") for point, name in summary.policy_points()]
    marks.append(_mark(summary, summary.sft, SFT_MARK, "bold"))
    return [mark for mark in marks if math.isfinite(mark.x) and math.isfinite(mark.y)]


def _mark(summary: Summary, point: PointSummary, character: str, style: str) -> Mark:
    x, y, *_ = (point.rewards[reward].value for reward in summary.objectives)
    return Mark(x, y, character, style)


def _letters(methods: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Return a letter and a colour for each method: the first letter of its name that is free."""
    found: dict[str, tuple[str, str]] = {}
    free = dict.fromkeys(string.ascii_uppercase + string.ascii_lowercase)
    for number, name in enumerate(methods):
        letter = next((one for one in (*name.upper(), *free) if one in free), "?")
        free.pop(letter, None)
        found[name] = (letter, _COLOURS[number % len(_COLOURS)])
    return found


def _numbers(summary: Summary) -> dict[str, str]:
    """Return the mark of each policy that was evaluated unmerged: 1 to 9, then `*`."""
    return {name: str(place) if place <= 9 else "*" for place, (_, name) in enumerate(summary.policy_points(), start=1)}


def _plot(marks: Sequence[Mark], labels: Sequence[str], width: int, lines: Sequence[str]) -> Iterator[Text]:
    """Yield the lines of the axes and of what is between them, at most so wide."""
    upright, tick, corner, across, down = lines
    heights = _Axis([mark.y for mark in marks], _ROWS)
    at_left = heights.ticks()
    left = max(map(len, at_left.values())) + 1
    if left > width - 2 - _FEWEST:
        at_left, left = dict.fromkeys(at_left, ""), 1
    columns = max(1, width - left - 2)
    along = _Axis([mark.x for mark in marks], columns)
    cells = _cells(marks, along, heights, columns)
    yield Text(labels[1])
    for row in reversed(range(_ROWS)):
        line = Text(f"{at_left.get(row, ''):>{left - 1}} {tick if row in at_left else upright} ")
        line.append_text(Text("").join(cells[row])).rstrip()
        yield line
    below = along.ticks()
    yield Text(" " * left + corner + across + "".join(down if one in below else across for one in range(len(cells[0]))))
    numbers = ""
    for cell, text in below.items():
        start = max(len(numbers) + 1 if numbers else 0, left + 2 + cell - len(text) // 2)
        if start + len(text) <= width:
            numbers = numbers.ljust(start) + text
    yield Text(numbers)
    yield Text(f"{labels[0]:>{width}}")


def _cells(marks: Sequence[Mark], along: _Axis, heights: _Axis, columns: int) -> list[list[Text]]:
    """Return the characters by row, from below, and column."""
    cells = [[Text(" ") for _ in range(columns)] for _ in range(_ROWS)]
    for mark in marks:
        cells[heights.cell(mark.y)][along.cell(mark.x)] = Text(mark.character, style=mark.style)
    return cells


def _legend(summary: Summary, width: int) -> Text:
    labels = texts.method_labels(summary)
    entries = [f"{letter} {labels[name]}" for name, (letter, _) in _letters(summary.merged_methods()).items()]
    entries += [f"{number} {name} alone" for name, number in _numbers(summary).items()]
    # textwrap breaks no line at such a space, so that each entry is whole.
    text = "   ".join(entry.replace(" ", "\N{NO-BREAK SPACE}") for entry in [*entries, f"{SFT_MARK} SFT"])
    return Text(textwrap.fill(text, width, break_on_hyphens=False).replace("\N{NO-BREAK SPACE}", " "))

"""An inspection as tables for the terminal and as data for JSON."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import JustifyMethod, RenderableType
from rich.table import Table
from rich.text import Text

from rewarded_lines.checkpoints.dtypes import FLOATS
from rewarded_lines.errors import printable
from rewarded_lines.merger.inspect import InspectedTensor, Inspection, Level, Residual, Sum
from rewarded_lines.merger.lines_schedule import Schedule
from rewarded_lines.merger.record import Record

Row = tuple[str, ...]

_LEVELS: Row = ("block", "tensors", "parameters", "type", "s")
_TENSORS: Row = ("block", "tensor", "shape", "type", "s")
_RESIDUAL: Row = ("‖τ‖", "‖τ‖/‖θ‖", "changed", "‖s·τ‖")
_LEFT = ("block", "tensor")
_SIDES = {"before": "before", "after": "after", "unknown": "other", "flat": "flat", "base": "base"}
_WHERE = {"before": "before the blocks", "after": "after the blocks", "unknown": "other, place not known"}
_WHERE |= {"flat": "in towers scaled by α", "base": "in towers kept from the base"}
_NAMED = 3


def as_dict(found: Inspection, tensors: bool) -> dict[str, Any]:
    """Return an inspection for JSON: null if not finite; `tensors` keeps single tensors."""
    left_out = ("schedule", *(() if tensors else ("tensors",)), *(() if found.schedules else ("schedules",)))
    content = {key: _plain(value) for key, value in vars(found).items() if key not in left_out}
    return content | _plain(found.schedule)


def on_terminal(found: Inspection, tensors: bool, width: int = 80) -> Iterator[RenderableType]:
    """Yield a heading, a table for each list of blocks with a row per block or tensor, and notes."""
    yield Text("\n".join(_heading(found)) + "\n")
    headings = _TENSORS if tensors else _LEVELS
    if found.base is not None:
        headings += _RESIDUAL[:1] if tensors else _RESIDUAL
    rows: Sequence[InspectedTensor | Level] = found.tensors if tensors else found.levels
    parts = {}
    for stack, blocks in found.stacks.items():
        title = printable(f"{stack}: {_count(blocks, 'block')}")
        # Without a base the rows lose the cells of the residual.
        parts[title] = [_row(one)[: len(headings)] for one in rows if one.stack == stack]
    if not tensors:
        parts[""] = [("total", *_sum_cells(found.total, ""))[: len(headings)]]
    yield from _tables(headings, parts, width)
    yield Text("\n" + "\n".join(_notes(found)), style="dim")


def _tables(headings: Row, parts: Mapping[str, Sequence[Row]], width: int) -> Iterator[RenderableType]:
    """Yield a table for each part, all with the widths of the first; a rule replaces an empty title."""
    everything = [headings, *(row for rows in parts.values() for row in rows)]
    widths = [max(map(len, column)) for column in zip(*everything, strict=True)]
    # On a narrow terminal one column folds: the names of tensors, or the types.
    folded, least = (headings.index("tensor"), 16) if "tensor" in headings else (headings.index("type"), 4)
    left = width - sum(widths) + widths[folded] - len(widths) + 1
    widths[folded] = max(least, min(widths[folded], left))
    gap = 2 if sum(widths) + 2 * (len(widths) - 1) <= width else 1
    for index, (title, rows) in enumerate(parts.items()):
        table = Table(box=None, padding=(0, gap, 0, 0), pad_edge=False, show_header=index == 0)
        for heading, wide in zip(headings, widths, strict=True):
            justify: JustifyMethod = "left" if heading in _LEFT else "right"
            table.add_column(Text(heading), justify=justify, width=wide, overflow="fold")
        for row in rows:
            # Text, not str: rich reads brackets in a name as markup.
            table.add_row(*map(Text, row))
        length = sum(widths) + gap * (len(widths) - 1)
        yield Text(("\n" if index else "") + title, style="bold") if title else Text("─" * length, style="dim")
        yield table


def _heading(found: Inspection) -> Iterator[str]:
    total = found.total
    size = f"{_count(total.tensors, 'tensor')}, {total.parameters:,} parameters, {total.bytes / 1e6:,.1f} MB"
    yield printable(f"{found.checkpoint}: {size}")
    if found.origin:
        made = found.origin.merge
        method = ", ".join([made.method, *(f"{name} {value}" for name, value in made.options.items())])
        policies = list(found.origin.policies)
        weights = ", ".join(f"λ {weight:g} {name}" for name, weight in zip(policies, made.weights, strict=True))
        yield printable(f"merged by {method}: {weights}; {made.schedule.text(policies)}")


def _notes(found: Inspection) -> Iterator[str]:
    for side, where in _WHERE.items():
        modules = [name for level in found.levels if level.side == side for name in level.modules]
        if modules:
            rest = f" and {len(modules) - _NAMED} more" if len(modules) > _NAMED else ""
            yield printable(f"{where}: {', '.join(modules[:_NAMED])}{rest}")
    outside = "" if found.schedule.outside == "alpha" else "; outside the blocks that of the block beside"
    yield f"s: LiNeS scale, {found.schedule.text()}{outside}"
    if found.base is not None:
        yield printable(f"τ: residual, what {found.checkpoint} adds to {found.base}; ‖·‖: L2 norm; θ: the base")
        yield "changed: share of values that differ from the base's"
    yield from map(printable, found.notes)


def _row(one: InspectedTensor | Level) -> Row:
    place = _SIDES[one.side] if one.block is None else str(one.block)
    scale = f"{one.scale:.4g}"
    if isinstance(one, Level):
        if len(one.scales) > 1:
            scale = f"{one.scales[0]:.4g}–{one.scales[-1]:.4g}"
        return (place, *_sum_cells(one, scale))
    shape = "×".join(map(str, one.shape)) or "scalar"
    cells = (printable(one.name), shape, _type(one.dtype), scale)
    return (place, *cells, *_residual_cells(one.residual))


def _sum_cells(whole: Sum, scale: str) -> Row:
    types = " ".join(map(_type, whole.dtypes))
    return (f"{whole.tensors:,}", f"{whole.parameters:,}", types, scale, *_residual_cells(whole.residual))


def _residual_cells(residual: Residual | None) -> Row:
    if residual is None:
        return ("",) * len(_RESIDUAL)
    relative = "–"
    if math.isfinite(residual.relative):
        relative = f"{100 * residual.relative:#.3g}".rstrip(".") + "%" if residual.relative else "0%"
    changed = _share(residual.changed, residual.values)
    return (_norm(residual.norm), relative, changed, _norm(residual.scaled_norm))


def _type(name: str) -> str:
    """Return a type's name in safetensors files, such as BF16."""
    return FLOATS[name].name if name in FLOATS else name


def _norm(value: float) -> str:
    return f"{value:#.4g}".rstrip(".") if value and math.isfinite(value) else f"{value:g}"


def _share(part: int, whole: int) -> str:
    """Return a percentage: 0% only for 0, 100% only for the whole."""
    if part in (0, whole):
        return "0%" if part == 0 else "100%"
    return f"{min(max(100 * part / whole, 0.1), 99.9):.1f}%"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _plain(value: Any) -> Any:
    if isinstance(value, Residual):
        return _plain(vars(value) | {"relative": value.relative, "share_changed": value.share_changed})
    if isinstance(value, Schedule):
        return value.as_dict() | {"outside": value.outside}
    if isinstance(value, Record):
        return _plain(value.merge.as_dict(list(value.policies)))
    if dataclasses.is_dataclass(value):
        return _plain(vars(value))
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

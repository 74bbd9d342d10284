"""Reads rows with declared roles from local files, or from a data set of the Hub.

Nothing is repaired or dropped: a row without a role is an error that names the row and its columns.
`rewarded_lines.data.dataset_formats` turns these rows into prompts, pairs and demonstrations.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import date, time, timedelta
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import Any
from uuid import UUID

import blake3

from rewarded_lines.config import DataSpec
from rewarded_lines.data.file_rows import without_gaps
from rewarded_lines.data.messages import check_text, is_chat, read_messages, written_chat
from rewarded_lines.data.published_rows import conversion
from rewarded_lines.data.row_files import read_local
from rewarded_lines.errors import UserError, fail, listed
from rewarded_lines.extras import require
from rewarded_lines.references import find_function, local_path

Row = dict[str, Any]
# The key of a row that holds its further columns, by name.
COLUMNS = "columns"
# A reward's function gets these from the row's prompt and the response to it.
_GIVEN = ("prompt", "prompts", "completion", "completions", "responses")
# Values that JSON lacks, and whose text tells them apart.
_TOLD_BY_TEXT = (date, time, timedelta, Decimal, UUID, bytes, Path)
# The sets of roles that a row may have, in order of preference.
Layouts = Sequence[tuple[str, ...]]
# Receives one sentence for the log.
Tell = Callable[[str], None]
_ANSWERS = ("completion", "chosen", "rejected")
# Names that published pairs have for the column of their prompt.
_PROMPT_NAMES = ("instruction", "question", "problem", "query", "input", "context", "post")
_CONVERTED = "refs/convert/parquet"
_MOST_NAMES = 12
_BRIEF = 600


def silent(sentence: str) -> None:
    """Drop the sentence."""


def read_rows(spec: DataSpec, layouts: Layouts, root: Path = Path()) -> list[Row]:
    """Return the rows of a source with the roles of the first layout that the columns of row 0 allow.

    A role holds a text, or a list of messages `{"role": ..., "content": ...}`. All columns but prompts and completions
    are kept, unchanged, under `COLUMNS`.
    """
    source = str(local_path(spec.file, root)) if spec.file is not None else str(spec.dataset)
    raw = read_local(Path(source), spec.split) if spec.file is not None else _from_hub(spec)
    rows = list(islice(_shape(raw, spec, layouts, root), spec.limit))
    if not rows:
        raise fail("there are no rows", where=source, expected="at least one")
    return rows


def rows_hash(rows: Iterable[Row]) -> str:
    """Return the BLAKE3 hash of rows."""
    hasher = blake3.blake3()
    for row in rows:
        hasher.update((row_text(row) + "\n").encode("utf-8", "surrogatepass"))
    return hasher.hexdigest()


def row_text(row: Row) -> str:
    """Return a row as JSON, equal for equal rows; a value that JSON lacks becomes a text."""
    return json.dumps(row, sort_keys=True, ensure_ascii=False, default=_value_text)


def _value_text(value: Any) -> str:
    """Return a text for a value; `str` cuts large arrays, and gives the address of an image."""
    if isinstance(value, _TOLD_BY_TEXT):
        return str(value)
    if isinstance(value, (set, frozenset)):
        return str(sorted(map(repr, value)))
    return blake3.blake3(pickle.dumps(value)).hexdigest()


def _shape(raw: Iterable[tuple[str, Row]], spec: DataSpec, layouts: Layouts, root: Path) -> Iterator[Row]:
    function = find_function(spec.rows, root, where="`rows`") if spec.rows else None
    layout: tuple[str, ...] | None = None
    for where, row in raw:
        for one in [row] if function is None else _call(function, row, where):
            named = _rename(one, spec.columns, where)
            layout = layout or _choose(named, layouts, where)
            columns = {name: value for name, value in named.items() if name not in _GIVEN}
            yield {role: _check(named, role, where, layouts) for role in layout} | {COLUMNS: columns}


def _call(function: Any, row: Row, where: str) -> list[Mapping[str, Any]]:
    """Return the rows that a user's function makes of one."""
    try:
        made = function(row)
    except Exception as error:  # noqa: BLE001 - a user's function may raise anything
        raise fail(
            f"the row function raised {type(error).__name__}: {error}",
            where=where,
            got=json.dumps(row, ensure_ascii=False, default=str)[:_BRIEF],
        ) from error
    rows = made if isinstance(made, list) else [] if made is None else [made]
    if not all(isinstance(one, Mapping) for one in rows):
        raise fail("the row function returned no row", where=where, expected="a dict, a list of dicts or None")
    return rows


def _rename(row: Mapping[str, Any], columns: Mapping[str, str], where: str) -> Row:
    """Return the row with the declared columns renamed to their roles."""
    renamed = {name: value for name, value in row.items() if name not in columns}
    for role, column in columns.items():
        value: Any = row
        for part in [column] if column in row else column.split("."):
            if not isinstance(value, Mapping) or part not in value:
                raise fail(f"no column `{column}` (declared for {role})", where=where, got=_names(row))
            value = value[part]
        renamed[role] = value
    return renamed


def _choose(row: Row, layouts: Layouts, where: str) -> tuple[str, ...]:
    present = [layout for layout in layouts if all(role in row for role in layout)]
    # A column may have a role's name by chance: `chosen` may be the index of an answer.
    texts = (layout for layout in present if all(isinstance(row[role], str) or is_chat(row[role]) for role in layout))
    layout = next(texts, present[0] if present else ())
    # Two texts may begin alike by chance: their beginning is no prompt if a column holds one.
    asked = next((name for name in _PROMPT_NAMES if name in row), "") if layout == _ANSWERS[1:] else ""
    if layout and not (asked and isinstance(row["chosen"], str)):
        return layout
    raise fail(
        f"`{asked}` may be the prompt of the pair" if asked else "the columns do not make a training row",
        where=where,
        expected=_expected(layouts),
        got=_names(row),
        remedy=conversion(row) or (f"`columns: {{prompt: {asked}}}`" if asked else _other_names(row, layouts)),
    )


def _other_names(row: Row, layouts: Layouts) -> str:
    """Return a remedy for columns without a role: the names that they may have, or a function."""
    chats = [("messages", name) for name, value in row.items() if isinstance(value, list) and is_chat(value)]
    texts = [("prompt", name) for name in _PROMPT_NAMES if isinstance(row.get(name), str)]
    known = [f"{role}: {name}" for role, name in (*chats, *texts) if (role,) in layouts]
    return (
        f"name them with `columns: {{{known[0] if known else 'ROLE: COLUMN'}}}`, or make them with a function: "
        "`rows: file.py:function` in a project file, `row_function` in a recipe"
    )


def _check(row: Row, role: str, where: str, layouts: Layouts) -> Any:
    value = row.get(role)
    if isinstance(value, str):
        value = written_chat(value, f"{where}, column `{role}`") or value
    # Some data sets store an answer as a single message.
    turns = is_chat(value) and (role in _ANSWERS or not isinstance(value, Mapping))
    if turns or isinstance(value, str):
        check_text(value, role, where)
        return read_messages(value, f"{where}, column `{role}`") if turns else value
    raise fail(
        f"no text in column `{role}`",
        where=where,
        expected=f"text, or messages such as {{'role': 'user', 'content': '...'}}; {_expected(layouts)}",
        got=f"{'nothing' if value is None else repr(value)[:80]}; {_names(row)}",
        remedy="leave such rows out with a row function, which returns None for them",
    )


def _expected(layouts: Layouts) -> str:
    return "columns " + ", or ".join(" + ".join(layout) for layout in layouts)


def _names(row: Mapping[str, Any]) -> str:
    return "columns " + (listed(list(row), _MOST_NAMES) or "none")


def _from_hub(spec: DataSpec) -> Iterator[tuple[str, Row]]:
    require("train", f"data set {spec.dataset}", "datasets", otherwise="or name a local file")
    import datasets

    try:
        # The Hub's own Parquet conversions keep each subset in a folder; no card names them.
        subset = {"data_dir" if spec.revision == _CONVERTED else "name": spec.subset}
        found = datasets.load_dataset(str(spec.dataset), split=spec.split, revision=spec.revision, **subset)
    except Exception as error:  # noqa: BLE001 - the library raises dozens of types, from requests to Arrow
        raise _hub_fault(spec, error) from error
    for number, row in enumerate(found):
        yield f"data set {spec.dataset}, split {spec.split}, row {number}", without_gaps(dict(row))


def _hub_fault(spec: DataSpec, error: Exception) -> UserError:
    got = f"{type(error).__name__}: " + " ".join(str(error).split())[:_BRIEF]
    what = "the data set cannot be loaded"
    remedy = "check the data set's id, and the names of subset, revision and split"
    if "Unknown split" in got:
        remedy = "name a split that it has, or a part of one, such as train[:1000] beside train[1000:]; a recipe's "
        remedy += "`dataset_test_split: null` trains SFT and reward models without validation"
    if Path(str(spec.dataset)).exists():
        remedy = f"a local folder or file is named with `file: {spec.dataset}`"
    if any(word in got.lower() for word in ("connect", "offline", "timed out")):
        what = "the data set cannot be reached"
        remedy = "check the network (HF_HUB_OFFLINE, HF_ENDPOINT), or name a local file"
    subset = f", subset {spec.subset}" if spec.subset else ""
    return fail(what, where=f"data set {spec.dataset}{subset}, split {spec.split}", got=got, remedy=remedy)

"""Reads rows with declared roles from a JSONL, Parquet or CSV file, or from a data set of the Hub.

Nothing is repaired or dropped: a row without a role is an error that names the row and its columns.
`rewarded_lines.data.dataset_formats` turns these rows into prompts, pairs and demonstrations.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import blake3

from rewarded_lines.config import DataSpec
from rewarded_lines.data.messages import check_text, is_chat, read_messages
from rewarded_lines.errors import UserError, fail, listed
from rewarded_lines.references import find_function, local_path

Row = dict[str, Any]
# The key of a row that holds its further columns, by name.
COLUMNS = "columns"
# A reward's function gets these from the row's prompt and the response to it.
_GIVEN = ("prompt", "prompts", "completion", "completions", "response", "responses")
# The sets of roles that a row may have, in order of preference.
Layouts = Sequence[tuple[str, ...]]
# Receives one sentence for the log.
Tell = Callable[[str], None]
_ANSWERS = ("completion", "chosen", "rejected")
_CONVERTED = "refs/convert/parquet"
_MOST_NAMES = 12
_BRIEF = 600
_LONGEST_FIELD = 1 << 27


def silent(sentence: str) -> None:
    """Drop the sentence."""


def read_rows(
    spec: DataSpec, layouts: Layouts, root: Path = Path(), beside: Sequence[str] = (), columns: bool = False
) -> list[Row]:
    """Return the rows of a source with the roles of the first layout that the columns of row 0 allow.

    A role holds a text, or a list of messages `{"role": ..., "content": ...}`.

    Args:
        spec: the source.
        layouts: e.g. `[("messages",), ("prompt", "completion")]`.
        root: the folder for relative paths.
        beside: further columns to keep, unchanged, in rows that fill them.
        columns: keep all columns but prompts and completions under `COLUMNS`, too, for rewards that read them.
    """
    source = str(local_path(spec.file, root)) if spec.file is not None else str(spec.dataset)
    raw = _from_file(Path(source)) if spec.file is not None else _from_hub(spec)
    rows = list(islice(_shape(raw, spec, layouts, root, beside, columns), spec.limit))
    if not rows:
        raise fail("there are no rows", where=source, expected="at least one")
    return rows


def rows_hash(rows: Iterable[Row]) -> str:
    """Return the BLAKE3 hash of rows."""
    hasher = blake3.blake3()
    for row in rows:
        text = json.dumps(row, sort_keys=True, ensure_ascii=False, default=str) + "\n"
        hasher.update(text.encode("utf-8", "surrogatepass"))
    return hasher.hexdigest()


def _shape(
    raw: Iterable[tuple[str, Row]],
    spec: DataSpec,
    layouts: Layouts,
    root: Path,
    beside: Sequence[str],
    columns: bool,
) -> Iterator[Row]:
    function = find_function(spec.rows, root, where="`rows`") if spec.rows else None
    layout: tuple[str, ...] | None = None
    for where, row in raw:
        for one in [row] if function is None else _call(function, row, where):
            named = _rename(one, spec.columns, where)
            layout = layout or _choose(named, layouts, where)
            kept = {name: named[name] for name in beside if named.get(name)}
            if columns:
                kept[COLUMNS] = {name: value for name, value in named.items() if name not in _GIVEN}
            yield {role: _check(named, role, where, layouts) for role in layout} | kept


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
    for layout in present:
        if all(isinstance(row[role], str) or is_chat(row[role]) for role in layout):
            return layout
    if present:
        return present[0]
    raise fail(
        "the columns do not make a training row",
        where=where,
        expected=_expected(layouts),
        got=_names(row),
        remedy="name them with `columns: {ROLE: COLUMN}`, or make them with a function: "
        "`rows: file.py:function` in a project file, `row_function` in a recipe",
    )


def _check(row: Row, role: str, where: str, layouts: Layouts) -> Any:
    value = row.get(role)
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
    )


def _expected(layouts: Layouts) -> str:
    return "columns " + ", or ".join(" + ".join(layout) for layout in layouts)


def _names(row: Mapping[str, Any]) -> str:
    return "columns " + (listed(list(row), _MOST_NAMES) or "none")


def _from_file(path: Path) -> Iterator[tuple[str, Row]]:
    readers = {".jsonl": _jsonl, ".json": _jsonl, ".parquet": _parquet, ".csv": _csv}
    if not path.is_file():
        remedy = "`rewarded-lines demo --until data` makes the demo's corpus"
        raise fail("no such file", where=str(path), expected="a JSONL, Parquet or CSV file", remedy=remedy)
    if path.suffix not in readers:
        raise fail("not a file type that can be read", where=str(path), expected=", ".join(readers))
    try:
        yield from readers[path.suffix](path)
    except UnicodeDecodeError as error:
        raise fail("not UTF-8 text", where=str(path), got=str(error)) from error


def _jsonl(path: Path) -> Iterator[tuple[str, Row]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                where = f"{path}, line {number}"
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    expected = "one JSON object a line"
                    raise fail("not JSON", where=where, expected=expected, got=str(error)) from error
                if not isinstance(row, dict):
                    raise fail("not a JSON object", where=where, got=type(row).__name__)
                yield where, row


def _csv(path: Path) -> Iterator[tuple[str, Row]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        csv.field_size_limit(_LONGEST_FIELD)
        reader = csv.DictReader(file, strict=True)
        try:
            _refuse_doubles(reader.fieldnames or [], str(path))
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                if None in row or None in row.values():
                    raise fail("another number of fields than in the header", where=where, got=str(row)[:_BRIEF])
                yield where, dict(row)
        except csv.Error as error:
            where = f"{path}, line {reader.line_num + 1}"
            raise fail("not readable as CSV", where=where, got=str(error)) from error


def _parquet(path: Path) -> Iterator[tuple[str, Row]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        _refuse_doubles(file.schema_arrow.names, str(path))
        rows = (row for batch in file.iter_batches() for row in batch.to_pylist())
        for number, row in enumerate(rows):
            yield f"{path}, row {number}", _without_gaps(row)
    except (pa.ArrowException, OSError) as error:
        raise fail("not readable as Parquet", where=str(path), got=str(error)) from error


def _without_gaps(row: Row) -> Row:
    """Return a row without nested nulls, which Arrow adds to give all rows the same keys."""
    return {name: _dense(value) for name, value in row.items()}


def _dense(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _dense(one) for key, one in value.items() if one is not None}
    return [_dense(one) for one in value] if isinstance(value, list) else value


def _refuse_doubles(names: Sequence[str], where: str) -> None:
    if doubles := sorted({name for name in names if names.count(name) > 1}):
        raise fail("several columns have one name", where=where, got=", ".join(doubles))


def _from_hub(spec: DataSpec) -> Iterator[tuple[str, Row]]:
    try:
        import datasets
    except ImportError as error:
        raise fail(
            "data sets of the Hub need the package `datasets`",
            where=f"data set {spec.dataset}",
            remedy="pip install 'rewarded-lines[train]', or name a local file",
        ) from error
    try:
        # The Hub's own Parquet conversions keep each subset in a folder; no card names them.
        subset = {"data_dir" if spec.revision == _CONVERTED else "name": spec.subset}
        found = datasets.load_dataset(str(spec.dataset), split=spec.split, revision=spec.revision, **subset)
    except Exception as error:  # noqa: BLE001 - the library raises dozens of types, from requests to Arrow
        raise _hub_fault(spec, error) from error
    for number, row in enumerate(found):
        yield f"data set {spec.dataset}, split {spec.split}, row {number}", _without_gaps(dict(row))


def _hub_fault(spec: DataSpec, error: Exception) -> UserError:
    got = f"{type(error).__name__}: " + " ".join(str(error).split())[:_BRIEF]
    what = "the data set cannot be loaded"
    remedy = "check the data set's id, and the names of subset, revision and split"
    if any(word in got.lower() for word in ("connect", "offline", "timed out")):
        what = "the data set cannot be reached"
        remedy = "check the network (HF_HUB_OFFLINE, HF_ENDPOINT), or name a local file"
    subset = f", subset {spec.subset}" if spec.subset else ""
    return fail(what, where=f"data set {spec.dataset}{subset}, split {spec.split}", got=got, remedy=remedy)

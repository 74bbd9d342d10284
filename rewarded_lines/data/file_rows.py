"""Reads the rows of one file: JSON or CSV, which may be compressed, Parquet or Arrow.

Text is read line by line, so that memory does not grow with the file; only a JSON document, such as an array, is read
whole. Parquet and Arrow are read batch by batch: nulls that Arrow adds are taken out, and objects that `datasets` keeps
as JSON are unpacked. A damaged file is an error that names the place.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import shlex
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from rewarded_lines.data.messages import is_chat
from rewarded_lines.errors import UserError, fail, listed

# Each row with its place.
Rows = Iterator[tuple[str, dict[str, Any]]]
_BRIEF = 600
_LONGEST_FIELD = 1 << 27
_DAMAGES = (EOFError, OSError, zlib.error)
_SPACE = re.compile(r"\s*")
# Commands that write the rows of a JSON document, one a line.
_COLUMNS = (
    """python -c "import json, sys; t = json.load(sys.stdin); [print(json.dumps(dict(zip(t, row)))) """
    """for row in zip(*(c.values() if isinstance(c, dict) else c for c in t.values()))]\""""
)
_ONE_TABLE = """python -c "import json, sys; [print(json.dumps(row)) for row in json.load(sys.stdin)['{key}']]\""""


def file_type(path: Path) -> str:
    """Return the suffix that tells how to read a file, without the suffix of its compression."""
    return (Path(path.stem) if path.suffix.lower() in PACKED else path).suffix.lower()


def read_json(path: Path) -> Rows:
    """Yield the rows of a JSON file with their places.

    It holds one object a line, an array, `{"data": [...]}` or its like, or indented objects one after another.
    """
    lines = ((number, line) for number, line in _lines(path) if line.strip())
    start = list(islice(lines, 2))
    if _is_lines(start, file_type(path)):
        yield from _json_lines(chain(start, lines), path)
    else:
        yield from _json_document(path)


def read_csv(path: Path, delimiter: str = ",") -> Rows:
    """Yield the rows of a CSV file with a header, with their places; every row has all fields."""
    csv.field_size_limit(_LONGEST_FIELD)
    reader = csv.DictReader((line for _, line in _lines(path)), strict=True, delimiter=delimiter)
    try:
        refuse_doubles(reader.fieldnames or [], str(path))
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            if None in row or None in row.values():
                raise fail("another number of fields than in the header", where=where, got=str(row)[:_BRIEF])
            yield where, dict(row)
    except csv.Error as error:
        where = f"{path}, line {reader.line_num + 1}"
        raise fail("not readable as CSV", where=where, got=str(error)) from error


def refuse_doubles(names: Sequence[str], where: str) -> None:
    """Refuse columns of one name."""
    if doubles := sorted({name for name in names if names.count(name) > 1}):
        raise fail("several columns have one name", where=where, got=", ".join(doubles))


def _is_lines(start: Sequence[tuple[int, str]], kind: str) -> bool:
    """Return whether each line is an object, by the first two lines of a file."""
    if not start or start[0][1].lstrip().startswith("["):
        return not start
    try:
        # A `.json` of one line may be an object that holds the rows.
        return kind != ".json" or (len(start) == 2 and json.loads(start[0][1]) is not None)
    except (ValueError, RecursionError):
        return False


def _json_lines(lines: Iterable[tuple[int, str]], path: Path) -> Rows:
    for number, line in lines:
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise fail("not JSON", where=where, expected="one JSON object a line", got=str(error)) from error
        yield where, _object(row, where)


def _json_document(path: Path) -> Rows:
    text = "".join(line for _, line in _lines(path))
    decoder, values, at = json.JSONDecoder(), [], _after_space(text, 0)
    try:
        while at < len(text):
            value, end = decoder.raw_decode(text, at)
            values.append(value)
            at = _after_space(text, end)
    except (ValueError, RecursionError) as error:
        where = f"{path}, line {getattr(error, 'lineno', 1)}"
        expected = "an array of JSON objects, or one object a line"
        raise fail("not JSON", where=where, expected=expected, got=str(error)) from error
    for number, row in enumerate(_rows_in(values[0], path) if len(values) == 1 else values):
        where = f"{path}, row {number}"
        yield where, _object(row, where)


def _after_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at


def _object(row: Any, where: str) -> dict[str, Any]:
    if isinstance(row, dict):
        return row
    raise fail("not a JSON object", where=where, got=type(row).__name__)


def _rows_in(value: Any, path: Path) -> list[Any]:
    """Return the rows of a document: those of an array, of `{"data": [...]}` or its like, or the one object."""
    if isinstance(value, list):
        # `datasets` reads an array of texts in this way.
        return [{"text": one} for one in value] if all(isinstance(one, str) for one in value) else value
    columns = list(value.values()) if isinstance(value, dict) else []
    arrays = [key for key, one in value.items() if _is_table(one)] if columns else []
    if arrays == ["data"] or (len(arrays) == len(columns) == 1):
        return list(value[arrays[0]])
    if arrays and len(arrays) == len(columns):
        raise _not_rows(path, f"several tables: {listed(arrays, 8)}", _ONE_TABLE.format(key=arrays[0]))
    if _are_columns(columns):
        raise _not_rows(path, f"columns: {listed(list(value), 8)}", _COLUMNS)
    return [value]


def _is_table(value: Any) -> bool:
    return (
        isinstance(value, list) and bool(value) and all(isinstance(one, dict) for one in value) and not is_chat(value)
    )


def _are_columns(values: Sequence[Any]) -> bool:
    """Return whether these are the columns of a table: lists of one length, or objects with the same keys."""
    if not values or any(map(is_chat, values)):
        return False
    lists = all(isinstance(one, list) for one in values) and len({len(one) for one in values}) == 1
    return lists or (all(isinstance(one, dict) and one for one in values) and len({tuple(one) for one in values}) == 1)


def _not_rows(path: Path, got: str, command: str) -> UserError:
    file = shlex.quote(str(path))
    remedy = f"unpack {file} first" if path.suffix.lower() in PACKED else f"{command} < {file} > {file}l"
    return fail("not an array of rows", where=str(path), expected="an array of JSON objects", got=got, remedy=remedy)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines of a text with their numbers, from 1."""
    number, packed = 0, PACKED.get(path.suffix.lower())
    try:
        if packed and not path.stat().st_size:
            raise EOFError("0 bytes")
        with io.TextIOWrapper(packed(path) if packed else path.open("rb"), encoding="utf-8-sig", newline="") as file:
            for number, line in enumerate(file, 1):
                yield number, line
    except UnicodeDecodeError as error:
        remedy = f"write it anew, if it is latin1: iconv -f latin1 -t utf-8 {shlex.quote(str(path))} > FILE"
        raise fail("not UTF-8 text", where=str(path), got=str(error), remedy=remedy) from error
    except _DAMAGES as error:
        got = f"{type(error).__name__}: {error}"
        what, remedy = "the file cannot be read to its end", "copy or download it again, if it is damaged or cut short"
        raise fail(what, where=f"{path}, after line {number}", got=got, remedy=remedy) from error


def _open_with_arrow(path: Path, kind: str) -> Any:
    import pyarrow as pa

    return pa.CompressedInputStream(pa.OSFile(str(path)), kind)


# How to open a text by the suffix of its compression.
PACKED: Mapping[str, Callable[[Path], Any]] = {
    ".gz": gzip.open, ".bz2": partial(_open_with_arrow, kind="bz2"), ".zst": partial(_open_with_arrow, kind="zstd"),
}  # fmt: skip


# The end of a stream of Arrow batches.
_END = b"\xff\xff\xff\xff\0\0\0\0"


def without_gaps(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row without nested nulls, which Arrow adds to give all rows the same keys."""
    return {name: _dense(value) for name, value in row.items()}


def _read(path: Path, kind: str, opened: Callable[[Any], tuple[Any, Iterator[Any]]]) -> Rows:
    import pyarrow as pa

    number = 0
    try:
        with pa.memory_map(str(path)) as source:
            schema, batches = opened(source)
            refuse_doubles(schema.names, str(path))
            packed = {field.name: field.type for field in schema if "arrow.json" in str(field.type)}
            for row in (row for batch in batches for row in batch.to_pylist()):
                dense = without_gaps(row)
                yield f"{path}, row {number}", dense | {name: _unpack(dense[name], packed[name]) for name in packed}
                number += 1
    except UnicodeDecodeError as error:
        raise fail("not UTF-8 text", where=f"{path}, from row {number} on", got=str(error)) from error
    except (pa.ArrowException, OSError, EOFError, ValueError) as error:
        raise fail(f"not readable as {kind}", where=str(path), got=str(error)) from error


def _parquet(source: Any) -> tuple[Any, Iterator[Any]]:
    import pyarrow.parquet as pq

    file = pq.ParquetFile(source)
    return file.schema_arrow, file.iter_batches()


def _arrow(source: Any) -> tuple[Any, Iterator[Any]]:
    """Return schema and batches of an Arrow file, or of a stream, which `datasets` writes."""
    import pyarrow as pa

    if source.read(6) == b"ARROW1":
        file = pa.ipc.open_file(source)
        return file.schema, (file.get_batch(number) for number in range(file.num_record_batches))
    source.seek(0)
    stream = pa.ipc.open_stream(source)
    return stream.schema, _whole(stream, source)


def _whole(stream: Any, source: Any) -> Iterator[Any]:
    """Yield the batches of a stream; Arrow takes one that was cut between two batches for a whole one."""
    yield from stream
    end = source.tell()
    source.seek(max(end - len(_END), 0))
    if end != source.size() or source.read() != _END:
        raise EOFError("the stream of batches has no end" if end == source.size() else f"more bytes follow after {end}")


def _unpack(value: Any, kind: Any) -> Any:
    """Return a value with the texts of Arrow's type JSON, in which `datasets` keeps objects of any keys, as objects."""
    import pyarrow as pa

    if isinstance(kind, pa.JsonType):
        return None if value is None else json.loads(value)
    if isinstance(value, Mapping):
        return {key: _unpack(one, kind.field(key).type) for key, one in value.items()}
    return [_unpack(one, kind.value_type) for one in value] if isinstance(value, list) else value


def _dense(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _dense(one) for key, one in value.items() if one is not None}
    return [_dense(one) for one in value] if isinstance(value, list) else value


# Each yields the rows of a file, or of an Arrow stream, with their places.
read_parquet = partial(_read, kind="Parquet", opened=_parquet)
read_arrow = partial(_read, kind="Arrow", opened=_arrow)

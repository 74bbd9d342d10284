"""Reads the rows of one Parquet or Arrow file, batch by batch.

Nulls that Arrow adds are taken out, and objects that `datasets` keeps as JSON are unpacked.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rewarded_lines.data.text_rows import Rows, refuse_doubles
from rewarded_lines.errors import fail

# The end of a stream of Arrow batches.
_END = b"\xff\xff\xff\xff\0\0\0\0"


def read_parquet(path: Path) -> Rows:
    """Yield the rows of a Parquet file with their places."""
    return _read(path, "Parquet", _parquet)


def read_arrow(path: Path) -> Rows:
    """Yield the rows of an Arrow file or stream with their places."""
    return _read(path, "Arrow", _arrow)


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

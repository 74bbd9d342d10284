"""Training corpora: JSONL files with declared columns, checked before anything is trained on them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rewarded_lines.errors import fail

if TYPE_CHECKING:
    from datasets import Dataset

COMPLETIONS = ("prompt", "completion")
PAIRS = ("prompt", "chosen", "rejected")


def read_corpus(path: Path | str, columns: Sequence[str], limit: int | None = None) -> Dataset:
    """Return the declared columns of a JSONL file as a data set; other columns are left out.

    Args:
        path: one JSON object a line.
        columns: `COMPLETIONS`, `PAIRS` or ("prompt",).
        limit: keep the first rows only.

    Raises:
        UserError: no such file, a line that is not JSON, a column that is missing or not text, or no rows.
    """
    from datasets import Dataset

    rows = read_rows(Path(path), columns, limit)
    return Dataset.from_dict({column: [row[column] for row in rows] for column in columns})


def read_rows(path: Path, columns: Sequence[str], limit: int | None = None) -> list[dict[str, str]]:
    """Return the rows of a JSONL file as dictionaries; see `read_corpus`."""
    if not path.is_file():
        remedy = "`rewarded-lines demo --until data` makes the demo's corpus"
        raise fail("no such file", where=str(path), expected="a JSONL corpus", remedy=remedy)
    rows: list[dict[str, str]] = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip() and (limit is None or len(rows) < limit):
                rows.append(_check_row(line, columns, f"{path}, line {number}"))
    if not rows:
        raise fail("the corpus is empty", where=str(path), expected="one JSON object a line")
    return rows


def _check_row(line: str, columns: Sequence[str], where: str) -> dict[str, str]:
    try:
        row: Any = json.loads(line)
    except ValueError as error:
        raise fail("not JSON", where=where, got=str(error)) from error
    if not isinstance(row, dict):
        raise fail("not a JSON object", where=where, got=type(row).__name__)
    for column in columns:
        if not isinstance(row.get(column), str):
            raise fail(
                f"no text in column `{column}`",
                where=where,
                expected="columns " + ", ".join(columns),
                got="columns " + (", ".join(row) or "none"),
            )
    return row

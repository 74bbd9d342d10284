"""The SFT model's own responses and preference pairs of them, best against worst; kept as Parquet and used again."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rewarded_lines.data.prompts import Prompt
from rewarded_lines.data.rows import Row
from rewarded_lines.errors import fail
from rewarded_lines.folders import atomic_file

_METADATA = b"rewarded_lines"
_COLUMNS = ("prompt", "chosen", "rejected")


def kept_rows(path: Path, made_from: Mapping[str, Any], make: Callable[[], list[Row]]) -> tuple[list[Row], bool]:
    """Return the responses or pairs in a file, or make and keep them there; and whether they were there already.

    Args:
        path: a Parquet file; rows that were made from something else are made again.
        made_from: all that decides them.
        make: makes them.

    Raises:
        UserError: the file is none of ours.
    """
    told = json.dumps(made_from, sort_keys=True)
    if path.exists():
        try:
            table = pq.read_table(path)
            metadata = (table.schema.metadata or {})[_METADATA].decode()
        except (pa.ArrowException, OSError, KeyError, UnicodeDecodeError) as error:
            raise fail(
                "not a file that this recipe made",
                where=str(path),
                got=f"{type(error).__name__}: {error}",
                remedy="remove it, or name another `pairs_file` or `samples_file`",
            ) from error
        if metadata == told:
            return [_unpacked(row) for row in table.to_pylist()], True
    rows = make()
    table = pa.Table.from_pylist([_packed(row) for row in rows]).replace_schema_metadata({_METADATA: told})
    with atomic_file(path) as partial:
        pq.write_table(table, partial)
    return rows, False


def best_and_worst(
    prompts: Sequence[Prompt],
    responses: Sequence[str],
    scores: Sequence[float],
    count: int,
    margin: float,
    ends: Sequence[int] = (),
) -> list[Row]:
    """Return the best against the worst response of each prompt, with their scores.

    Args:
        prompts: each `count` times in a row.
        responses: one for each entry of `prompts`.
        scores: of the responses.
        count: responses of a prompt.
        margin: least gap, in standard deviations of all scores; prompts with less make no pair.
        ends: the token that ended each response, −1 for one that none ended; kept with the pairs.

    Raises:
        UserError: no prompt makes a pair.
    """
    least = margin * statistics.pstdev(scores)
    rows = []
    for start in range(0, len(prompts), count):
        of_prompt = range(start, start + count)
        best, worst = max(of_prompt, key=scores.__getitem__), min(of_prompt, key=scores.__getitem__)
        if scores[best] - scores[worst] > least:
            prompt = prompts[start]
            sides = {"chosen": best, "rejected": worst}
            row: Row = {"prompt": prompt}
            row |= {side: _as_answer(prompt, responses[index]) for side, index in sides.items()}
            row |= {f"{side}_score": scores[index] for side, index in sides.items()}
            row |= {f"{side}_end": ends[index] for side, index in sides.items()} if ends else {}
            rows.append(row)
    if not rows:
        raise fail("no two responses to a prompt differ enough in reward", remedy="lower `margin`")
    return rows


def _as_answer(prompt: Prompt, response: str) -> Prompt:
    return response if isinstance(prompt, str) else [{"role": "assistant", "content": response}]


def _packed(row: Row) -> Row:
    """Return a row with chats as JSON, so that a column has one type whatever it holds."""
    return {key: json.dumps(value) if isinstance(value, list) else value for key, value in row.items()} | {
        "chat": isinstance(row["prompt"], list)
    }


def _unpacked(row: Row) -> Row:
    chat = row.pop("chat")
    return {key: json.loads(value) if chat and key in _COLUMNS else value for key, value in row.items()}

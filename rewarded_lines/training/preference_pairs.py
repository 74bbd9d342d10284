"""Preference pairs of the SFT model's own responses, the best against the worst, cached as Parquet.

TRL's DPOTrainer gets them tokenized here, with the tokens that measuring and generating use.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset
from trl import DPOTrainer

from rewarded_lines.data.messages import as_answer
from rewarded_lines.data.prompts import Prompt, encode, encode_answers
from rewarded_lines.data.rows import Row
from rewarded_lines.errors import fail
from rewarded_lines.folders import atomic_file
from rewarded_lines.training.gains import scored
from rewarded_lines.training.moving_reference import MovingReference

_METADATA = b"rewarded_lines"
_COLUMNS = ("prompt", "chosen", "rejected")


def kept_rows(path: Path, made_from: Mapping[str, Any], make: Callable[[], list[Row]]) -> tuple[list[Row], bool]:
    """Return the rows in a Parquet file and True, if made from `made_from`; else make and keep them."""
    origin = json.dumps(made_from, sort_keys=True)
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
        if metadata == origin:
            return [_unpacked(row) for row in table.to_pylist()], True
    rows = make()
    table = pa.Table.from_pylist([_packed(row) for row in rows]).replace_schema_metadata({_METADATA: origin})
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
    tokens: Sequence[Sequence[int] | None] = (),
) -> list[Row]:
    """Return a pair of the best and the worst response to each prompt, with their scores.

    Each prompt stands `count` times in a row, once for each response. A response without a score (NaN) enters no pair,
    and no deviation. The scores of a pair differ by more than `margin` standard deviations of all scores. `ends` are
    the tokens that ended responses, −1 for none; they are kept with the pairs, and so are the `tokens` of responses.
    """
    least = margin * statistics.pstdev(scored(scores) or [0.0])
    rows, compared = [], 0
    for start in range(0, len(prompts), count):
        prompt, places = prompts[start], [at for at in range(start, start + count) if not math.isnan(scores[at])]
        if len(places) < 2:
            continue
        compared += 1
        best, worst = max(places, key=scores.__getitem__), min(places, key=scores.__getitem__)
        if scores[best] - scores[worst] > least:
            sides = {"chosen": best, "rejected": worst}
            row: Row = {"prompt": prompt}
            answers = {side: responses[place] for side, place in sides.items()}
            row |= answers if isinstance(prompt, str) else {side: as_answer(one) for side, one in answers.items()}
            row |= {f"{side}_score": scores[place] for side, place in sides.items()}
            row |= {f"{side}_end": ends[place] for side, place in sides.items()} if ends else {}
            row |= {f"{side}_tokens": tuple(tokens[place] or ()) for side, place in sides.items()} if tokens else {}
            rows.append(row)
    if not compared:
        remedy = "train on prompts that the reward scores, or sample more `responses` to each"
        raise fail("the reward abstains: no prompt has two responses with a score", remedy=remedy)
    if not rows:
        raise fail("no two responses to a prompt differ enough in reward", remedy="lower `margin`")
    return rows


def _packed(row: Row) -> Row:
    """Return a row with chats as JSON: a Parquet column has one type, for texts and chats."""
    content = {key: json.dumps(value) if isinstance(value, list) else value for key, value in row.items()}
    return content | {"chat": isinstance(row["prompt"], list)}


def _unpacked(row: Row) -> Row:
    chat = row.pop("chat")
    return {key: json.loads(value) if chat and key in _COLUMNS else value for key, value in row.items()}


class TokenDPOTrainer(MovingReference, DPOTrainer):  # type: ignore[misc]
    """DPOTrainer that takes the columns prompt_ids, chosen_ids and rejected_ids as they are."""

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset


def pair_tokens(tokenizer: Any, pairs: Sequence[Row], ends: Collection[int]) -> Dataset:
    """Return pairs as token ids, and the length of the longer side; `chosen_end` is a sampled end token, or −1."""
    prompts = [row["prompt"] for row in pairs]
    columns: dict[str, list[Any]] = {}
    kept = ("chosen_tokens", "rejected_tokens")
    if all(isinstance(row["prompt"], list) and all(row.get(key) for key in kept) for row in pairs):
        # As they were sampled: a chat template may trim an answer, or put empty thoughts before it.
        columns = {f"{side}_ids": [list(row[f"{side}_tokens"]) for row in pairs] for side in ("chosen", "rejected")}
        columns["prompt_ids"] = encode(tokenizer, prompts)
    for side in () if columns else ("chosen", "rejected"):
        answers = [row[side] for row in pairs]
        columns["prompt_ids"], tails = encode_answers(tokenizer, prompts, answers, ends)
        sampled = zip(tails, (row.get(f"{side}_end") for row in pairs), strict=True)
        columns[f"{side}_ids"] = [tail if end is None else _ended_by(tail, end, ends) for tail, end in sampled]
    sides = zip(columns["prompt_ids"], columns["chosen_ids"], columns["rejected_ids"], strict=True)
    columns["length"] = [len(prompt) + max(len(chosen), len(rejected)) for prompt, chosen, rejected in sides]
    return Dataset.from_dict(columns)


def _ended_by(tail: list[int], end: int, ends: Collection[int]) -> list[int]:
    """Return an answer's tokens with the end token that it was sampled with, or with none (−1)."""
    answer = tail[:-1] if tail and tail[-1] in ends else tail
    return [*answer, end] if end >= 0 else answer

"""TRL's DPOTrainer on pairs tokenized here, with the tokens that measuring and generating use."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from datasets import Dataset
from trl import DPOTrainer

from rewarded_lines.data.prompts import encode_answers
from rewarded_lines.data.rows import Row
from rewarded_lines.training.moving_reference import MovingReference


class TokenDPOTrainer(MovingReference, DPOTrainer):  # type: ignore[misc]
    """DPOTrainer that takes the columns prompt_ids, chosen_ids and rejected_ids as they are."""

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset


def pair_tokens(tokenizer: Any, pairs: Sequence[Row], ends: Collection[int]) -> Dataset:
    """Return pairs as token ids; `chosen_end` and `rejected_end` are sampled end tokens, −1 for none."""
    prompts, columns = [row["prompt"] for row in pairs], {}
    for side in ("chosen", "rejected"):
        answers = [row[side] for row in pairs]
        columns["prompt_ids"], tails = encode_answers(tokenizer, prompts, answers, ends)
        sampled = zip(tails, (row.get(f"{side}_end") for row in pairs), strict=True)
        columns[f"{side}_ids"] = [tail if end is None else _ended_by(tail, end, ends) for tail, end in sampled]
    return Dataset.from_dict(columns)


def _ended_by(tail: list[int], end: int, ends: Collection[int]) -> list[int]:
    """Return an answer's tokens with the end token that it was sampled with, or with none (−1)."""
    answer = tail[:-1] if tail and tail[-1] in ends else tail
    return [*answer, end] if end >= 0 else answer

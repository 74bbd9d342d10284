"""Rows that are too long for a model: refused, left out, or shortened, before anything is computed.

Responses are never cut. A prompt is shortened from its beginning: a text loses its first words, a chat its
oldest turns, but never the system turn.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from rewarded_lines.config import TooLong
from rewarded_lines.data.messages import Prompt
from rewarded_lines.data.rows import COLUMNS, Row, Tell, silent
from rewarded_lines.errors import Problem, UserError, fail, listed

T = TypeVar("T")
_OFFSET_POSITIONS = (
    "roberta", "xlm-roberta", "xlm-roberta-xl", "roberta-prelayernorm", "camembert", "longformer", "mpnet", "luke",
    "data2vec-text", "ibert", "esm", "xmod",
)  # fmt: skip
_SHOWN = 5
_BEGINNING = 60


@dataclass(frozen=True)
class Limit:
    """A limit on the length of rows.

    Attributes:
        what: the reader, for messages: "the policy", "reward `helpful`".
        most: the most tokens of a row.
        option: the setting behind the limit.
        lengths: returns the tokens of each row.
    """

    what: str
    most: int
    option: str
    lengths: Callable[[Sequence[Any]], Sequence[int]]

    def exceeded(self, lengths: Sequence[int]) -> list[int]:
        """Return the places of the rows that are too long."""
        return [at for at, length in enumerate(lengths) if length > self.most]


def fit(
    rows: Sequence[T],
    limits: Sequence[Limit],
    too_long: TooLong,
    where: str,
    tell: Tell = silent,
) -> list[T]:
    """Return the rows, prompts, pairs or demonstrations, that keep the limits of all models that read them.

    Raises:
        UserError: rows are too long and must be refused, or none are left.
    """
    for limit in limits:
        if limit.most < 1:
            raise fail(
                f"no prompt fits beside the longest response for {limit.what}",
                where=where,
                expected="room for a prompt",
                got=f"{limit.most} tokens ({limit.option})",
                remedy="lower the length of responses, or raise that limit",
            )
    measured = [(limit, list(limit.lengths(rows))) for limit in limits]
    for limit, lengths in measured:
        tell(f"{where}: up to {max(lengths)} of {limit.most} tokens ({limit.option}) for {limit.what}")
    places = sorted({at for limit, lengths in measured for at in limit.exceeded(lengths)})

    def fits(row: T) -> bool:
        return not any(limit.exceeded(limit.lengths([row])) for limit in limits)

    found = {at: _shorten(rows[at], fits) for at in places if too_long == "truncate"}
    made = {at: row for at, row in found.items() if row is not None}
    left_out = [at for at in places if at not in made]
    if left_out and (too_long == "refuse" or len(left_out) == len(rows)):
        faults = [(limit, lengths) for limit, lengths in measured if limit.exceeded(lengths)]
        raise UserError(_problem(rows, limit, lengths, where, too_long) for limit, lengths in faults)
    too_many = f"of {len(rows)} rows are too long"
    if made:
        tell(f"{where}: {len(made)} {too_many}; their prompts are shortened from the beginning")
    if left_out:
        tell(f"{where}: {len(left_out)} {too_many} and left out: {listed(left_out, _SHOWN)}")
    gone = set(left_out)
    return [made.get(at, row) for at, row in enumerate(rows) if at not in gone]


def fit_prompts(
    rows: Sequence[Row], limits: Sequence[Limit], too_long: TooLong, where: str, tell: Tell = silent
) -> list[Row]:
    """Return the rows whose prompts keep every limit; see `fit`. The limits measure prompts."""

    def of_rows(limit: Limit) -> Limit:
        return replace(limit, lengths=lambda some: limit.lengths([row["prompt"] for row in some]))

    return fit(rows, [of_rows(limit) for limit in limits], too_long, where, tell)


def _shorten(row: Any, fits: Callable[[Any], bool]) -> Any:
    """Return a prompt, or a row with its prompt or the turns before its answer, shortened until it fits, or None."""
    if not isinstance(row, dict):
        return shorten_prompt(row, fits)
    if "messages" in row:
        *before, last = row["messages"]
        turns = shorten_prompt(before, lambda turns: fits({**row, "messages": [*turns, last]}))
        return None if turns is None else {**row, "messages": [*turns, last]}
    prompt = shorten_prompt(row["prompt"], lambda prompt: fits({**row, "prompt": prompt}))
    return None if prompt is None else {**row, "prompt": prompt}


def shorten_prompt(prompt: Prompt, fits: Callable[[Prompt], bool]) -> Prompt | None:
    """Return the longest end of a prompt that fits; None if not even its last word fits.

    A chat keeps its system turn and its last turn, and begins with a user's turn.
    """
    if isinstance(prompt, str):
        return _end_of(prompt, fits)
    system = [turn for turn in prompt[:1] if turn["role"] == "system"]
    turns = prompt[len(system) :]
    if not turns:
        return None
    for start in [at for at, turn in enumerate(turns) if turn["role"] == "user"] or [len(turns) - 1]:
        if fits([*system, *turns[start:]]):
            return [*system, *turns[start:]]
    last = turns[-1]
    if last["role"] != "user":
        return None
    text = _end_of(last["content"], lambda words: fits([*system, {**last, "content": words}]))
    return None if text is None else [*system, {**last, "content": text}]


def positions_of(config: Any) -> int | None:
    """Return the number of positions of a model's text part, or None if its config sets no limit."""
    own = config.get_text_config()
    positions = getattr(own, "max_position_embeddings", None)
    # RoBERTa and its relatives count positions from after the padding token.
    if positions and own.model_type in _OFFSET_POSITIONS:
        positions -= (own.pad_token_id or 0) + 1
    # XLNet gives −1 for no limit.
    return positions if positions and positions > 0 else None


def _end_of(text: str, fits: Callable[[str], bool]) -> str | None:
    """Return the longest end of a text that fits and begins with a word."""
    starts = [word.start() for word in re.finditer(r"\S+", text)]
    # False for ends that are too long, then True: they are sorted.
    first = bisect_left(starts, True, key=lambda start: fits(text[start:]))
    return text[starts[first] :] if first < len(starts) else None


def _problem(rows: Sequence[Any], limit: Limit, lengths: Sequence[int], where: str, too_long: TooLong) -> Problem:
    over = limit.exceeded(lengths)
    row = rows[over[0]]
    # Of a prompt's row, the columns do not count.
    first = repr(row["prompt"] if isinstance(row, dict) and row.keys() <= {"prompt", COLUMNS} else row)
    beginning = first if len(first) <= _BEGINNING else f"{first[:_BEGINNING]}…"
    way = "set `too_long: leave_out` or `too_long: truncate` (of prompts, from their beginning), or "
    return Problem(
        f"{len(over)} of {len(rows)} rows are too long for {limit.what}",
        where=where,
        expected=f"at most {limit.most} tokens ({limit.option})",
        got=f"up to {max(lengths)} tokens, in rows {listed(over, _SHOWN)}; the first begins {beginning}",
        remedy=f"{way if too_long == 'refuse' else ''}raise the limit if the model can read more",
    )

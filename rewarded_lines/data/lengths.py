"""Rows that some model cannot read: found before anything is spent, and refused, left out, or shortened, as declared.

A response is never cut. Shortened is the prompt, from its beginning: the oldest turns of a chat (not the system's), the
first words of a text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from rewarded_lines.config import TooLong
from rewarded_lines.data.forms import Tell, silent
from rewarded_lines.data.messages import Prompt
from rewarded_lines.errors import Problem, UserError, fail

T = TypeVar("T")
_OFFSET_POSITIONS = (
    "roberta", "xlm-roberta", "xlm-roberta-xl", "roberta-prelayernorm", "camembert", "longformer", "mpnet", "luke",
    "data2vec-text", "ibert", "esm", "xmod",
)  # fmt: skip
_SHOWN = 5
_BEGINNING = 60


@dataclass(frozen=True)
class Limit:
    """A limit that rows must keep.

    Attributes:
        what: who reads them, for messages: "the policy", "reward `helpful`".
        most: the most tokens that a row may have there.
        option: what says so, and can be raised.
        lengths: how many tokens some rows have there.
    """

    what: str
    most: int
    option: str
    lengths: Callable[[Sequence[Any]], Sequence[int]]


def fit(
    rows: Sequence[T],
    limits: Sequence[Limit],
    too_long: TooLong,
    where: str,
    shorten: Callable[[T, Callable[[T], bool]], T | None],
    tell: Tell = silent,
) -> list[T]:
    """Return the rows that every limit lets pass.

    Args:
        rows: prompts, pairs, demonstrations.
        limits: what they must keep.
        too_long: what becomes of the others.
        where: whose rows they are, for messages.
        shorten: cuts a row's prompt until it fits; None where it cannot. Called with "truncate" only.
        tell: called with what was found and done.

    Raises:
        UserError: rows are too long and shall be refused, or none are left.
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
    measured = [list(limit.lengths(rows)) for limit in limits]
    over = [
        [at for at, length in enumerate(lengths) if length > limit.most]
        for limit, lengths in zip(limits, measured, strict=True)
    ]
    for limit, lengths in zip(limits, measured, strict=True):
        tell(f"{where}: up to {max(lengths)} of {limit.most} tokens ({limit.option}) for {limit.what}")
    places = sorted({at for several in over for at in several})
    made: dict[int, T] = {}
    if places and too_long == "truncate":
        found = {at: shorten(rows[at], lambda row: all(_fits(row, limit) for limit in limits)) for at in places}
        made = {at: row for at, row in found.items() if row is not None}
    left_out = [at for at in places if at not in made]
    if left_out and (too_long == "refuse" or len(left_out) == len(rows)):
        faults = zip(limits, measured, over, strict=True)
        raise UserError(_problem(rows, *fault, where, too_long) for fault in faults if fault[2])
    if made:
        tell(f"{where}: {len(made)} of {len(rows)} rows are too long; their prompts are shortened from the beginning")
    if left_out:
        tell(f"{where}: {len(left_out)} of {len(rows)} rows are too long and left out: {_named(left_out)}")
    gone = set(left_out)
    return [made.get(at, row) for at, row in enumerate(rows) if at not in gone]


def shorten_prompt(prompt: Prompt, fits: Callable[[Prompt], bool]) -> Prompt | None:
    """Return the longest end of a prompt that fits; None if not even its last word does.

    Args:
        prompt: a text or a chat. A chat keeps its system turn, begins with a user's turn, and keeps the last turn.
        fits: says whether a prompt is short enough.
    """
    if isinstance(prompt, str):
        return _end_of(prompt, fits)
    system = [turn for turn in prompt[:1] if turn["role"] == "system"]
    turns = prompt[len(system) :]
    if not turns:
        return None
    starts = [at for at, turn in enumerate(turns) if turn["role"] == "user"] or [len(turns) - 1]
    for start in starts:
        if fits([*system, *turns[start:]]):
            return [*system, *turns[start:]]
    last = turns[-1]
    if last["role"] != "user":
        return None
    text = _end_of(last["content"], lambda words: fits([*system, {**last, "content": words}]))
    return None if text is None else [*system, {**last, "content": text}]


def positions_of(config: Any) -> int | None:
    """Return for how many tokens a model has positions, if its config says so.

    Args:
        config: of the model; of one that reads more than texts, its text part counts.
    """
    own = config.get_text_config()
    positions = getattr(own, "max_position_embeddings", None)
    # RoBERTa and its kin count positions from behind the padding token.
    if positions and own.model_type in _OFFSET_POSITIONS:
        positions -= (own.pad_token_id or 0) + 1
    # XLNet says −1: there is no end.
    return positions if positions and positions > 0 else None


def _end_of(text: str, fits: Callable[[str], bool]) -> str | None:
    """Return the longest end of a text, from the beginning of a word, that fits."""
    starts = [at for at in range(len(text)) if not text[at].isspace() and (at == 0 or text[at - 1].isspace())]
    low, high = 0, len(starts)
    # The longer the end, the more tokens: the first start that fits is looked for by halves.
    while low < high:
        middle = (low + high) // 2
        if fits(text[starts[middle] :]):
            high = middle
        else:
            low = middle + 1
    return text[starts[low] :] if low < len(starts) else None


def _fits(row: Any, limit: Limit) -> bool:
    return limit.lengths([row])[0] <= limit.most


def _problem(
    rows: Sequence[Any], limit: Limit, lengths: Sequence[int], over: Sequence[int], where: str, too_long: TooLong
) -> Problem:
    first = repr(rows[over[0]])
    beginning = first if len(first) <= _BEGINNING else f"{first[:_BEGINNING]}…"
    way = "set `too_long: leave_out` or `too_long: truncate` (of prompts, from their beginning), or "
    return Problem(
        f"{len(over)} of {len(rows)} rows are too long for {limit.what}",
        where=where,
        expected=f"at most {limit.most} tokens ({limit.option})",
        got=f"up to {max(lengths)} tokens, in rows {_named(over)}; the first begins {beginning}",
        remedy=f"{way if too_long == 'refuse' else ''}raise the limit if the model can read more",
    )


def _named(places: Sequence[int]) -> str:
    more = f" and {len(places) - _SHOWN} more" if len(places) > _SHOWN else ""
    return ", ".join(map(str, places[:_SHOWN])) + more

"""Splits a row of preference data into its prompt and its two answers.

Published data have many forms: a separate prompt, or one that both sides begin with; texts or chats; whole
chats beside a prompt that repeats their first turn; one text that holds several turns (hh-rlhf).
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from rewarded_lines.data.messages import ASSISTANT, Message, Messages, Prompt, as_answer
from rewarded_lines.data.rows import Row
from rewarded_lines.errors import UserError, fail

# The prompt, the chosen and the rejected answer, and how the prompt was found ("" if it was given).
Parts = tuple[Prompt, list[Any], str]
_REPEATED = "chosen and rejected repeat the prompt"


def split_pair(row: Row, where: str) -> Parts:
    """Return the parts of a pair, texts or turns as in the row; refuse sides with different prompts."""
    sides = [row["chosen"], row["rejected"]]
    prompt = row.get("prompt", row.get("conversations"))
    if prompt is None and "messages" in row and as_answer(sides[0])[0]["role"] == "assistant":
        prompt = row["messages"]
    if any(isinstance(one, list) for one in (*sides, prompt)):
        return _split_chats(prompt, [as_answer(side) for side in sides], where)
    if prompt and all(side.startswith(prompt) and len(side) > len(prompt) for side in sides):
        marked = all(side.startswith(ASSISTANT, len(prompt)) for side in sides)
        cut = len(prompt) + (len(ASSISTANT) if marked else 0)
        return sides[0][:cut], [side[cut:] for side in sides], _REPEATED
    return (prompt, sides, "") if prompt is not None else _split_texts(sides, where)


def has_text(turn: Message, text: str) -> bool:
    """Return whether a turn has this text, apart from white space around it."""
    return isinstance(turn["content"], str) and turn["content"].strip() == text.strip()


def _split_chats(prompt: Any, sides: list[Messages], where: str) -> Parts:
    if isinstance(prompt, list):
        turns = [turn for turn in prompt if turn["role"] != "system"]
        starts = [_answer_start(side, turns) for side in sides]
        if all(start is not None for start in starts):
            # The system turn may stand in the prompt only, or in both sides only.
            opening = max(prompt, sides[0][: starts[0]], key=len)
            return opening, [side[start:] for side, start in zip(sides, starts, strict=True)], _REPEATED
        return prompt, sides, ""
    if prompt and all(side[0]["role"] == "assistant" for side in sides):
        return [{"role": "user", "content": prompt}], sides, ""
    shared = sum(1 for _ in takewhile(lambda both: _same(*both), zip(*sides, strict=False)))
    if shared == min(map(len, sides)):
        # The sides are equal, or one continues the other: answers begin at the last assistant's turn.
        places = (at for at in range(shared) if sides[0][at]["role"] == "assistant")
        shared = max(places, default=0)
    opening = sides[0][:shared]
    if not opening or any(len(side) <= shared for side in sides):
        raise _different_prompts(sides, where)
    if prompt and not any(has_text(turn, prompt) for turn in opening):
        raise fail(
            "the prompt is not among the turns that chosen and rejected begin with",
            where=where,
            expected=f"a user's turn with the text of `prompt`: {prompt[:80]!r}",
            got=repr(opening)[:160],
            remedy="leave the column out with a row function, if the turns are right",
        )
    return opening, [side[shared:] for side in sides], "prompt taken from the first turns of chosen"


def _answer_start(side: Messages, turns: Messages) -> int | None:
    """Return where the answer begins in a chat that repeats `turns`, or None in other chats."""
    skipped = 1 if side[0]["role"] == "system" else 0
    own = side[skipped : skipped + len(turns)]
    repeats = len(own) == len(turns) < len(side) - skipped and all(map(_same, own, turns))
    return skipped + len(turns) if repeats and turns else None


def _split_texts(sides: Sequence[str], where: str) -> Parts:
    """Split texts after the last common "Assistant:", or before the first different word."""
    common = os.path.commonprefix(list(sides))
    cut, how = common.rfind(ASSISTANT), "prompt taken up to the last `Assistant:` that both sides have"
    if cut >= 0:
        cut += len(ASSISTANT)
    else:
        # Without a word that is common in part, and without the space after the last one.
        inside_word = any(side[len(common) :][:1].strip() for side in sides)
        cut = len((re.sub(r"\S+$", "", common) if inside_word else common).rstrip())
        how = "prompt taken from the words that both sides begin with"
    if cut <= 0 or sides[0] == sides[1]:
        raise _different_prompts(sides, where)
    return common[:cut], [side[cut:] for side in sides], how


def _same(one: Message, two: Message) -> bool:
    """Return whether two turns have the same role and text; other keys may differ."""
    return one == two or (
        one["role"] == two["role"] and isinstance(two["content"], str) and has_text(one, two["content"])
    )


def _different_prompts(sides: Sequence[Any], where: str) -> UserError:
    fault = "begin differently" if sides[0] != sides[1] else "are the same"
    return fail(
        f"the two sides of a pair {fault}",
        where=where,
        expected="a prompt of its own, or one that both sides begin with",
        got=f"{str(sides[0])[:80]!r} and {str(sides[1])[:80]!r}",
        remedy="leave such rows out with a row function",
    )

"""What a row means, by its form: one reading of prompts, pairs and demonstrations for all recipes and the sweep.

Published preference data have many forms: a prompt of its own or one that both sides begin with, texts or chats, whole
chats beside a prompt that repeats their first turn, one text with turns (hh-rlhf). Each becomes a prompt and two
answers, all of them texts or all of them chats. What was done is told in a sentence.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from rewarded_lines.config import DataSpec
from rewarded_lines.data.messages import Messages, Prompt, is_chat
from rewarded_lines.data.rows import Layouts, Row, read_rows
from rewarded_lines.errors import UserError, fail

Tell = Callable[[str], None]
PAIRS: Layouts = [
    ("prompt", "chosen", "rejected"), ("conversations", "chosen", "rejected"), ("messages", "chosen", "rejected"),
    ("chosen", "rejected"),
]  # fmt: skip
PROMPTS: Layouts = [*PAIRS, ("prompt", "messages"), ("prompt",), ("messages",), ("conversations",)]
DEMONSTRATIONS: Layouts = [("messages",), ("prompt", "completion"), ("conversations",), ("text",)]
# Columns that say something of a chat beside its turns.
_SYSTEM, _TOOLS, _SETTINGS = "system", "tools", "chat_template_kwargs"
# Turns in one text, as in Anthropic's hh-rlhf.
_ASSISTANT = "\n\nAssistant:"
_REPEATED = "chosen and rejected repeat the prompt"
_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")


def silent(sentence: str) -> None:
    """Tell nobody."""


def read_prompts(spec: DataSpec, root: Path = Path(), tell: Tell = silent) -> list[Prompt]:
    """Return the prompts of a source, texts or chats; of pairs, demonstrations and whole chats, what is to be answered.

    Args:
        spec: the source.
        root: the folder that relative paths in it start from.
        tell: called with how the rows were read.

    Raises:
        UserError: the data are missing, or a row has no prompt that can be answered.
    """
    rows = _read(spec, root, PROMPTS, tell)
    made = [_pair(row, spec, at) if "chosen" in row else (_prompt(row, spec, at), "") for at, row in enumerate(rows)]
    prompts = [row["prompt"] if isinstance(row, dict) else row for row, _ in made]
    _same_kind(prompts, spec)
    tell(_sentence(prompts[0], [how for _, how in made], spec))
    return prompts


def read_pairs(spec: DataSpec, root: Path = Path(), tell: Tell = silent) -> list[Row]:
    """Return rows of prompt, chosen and rejected: three texts, or three lists of turns.

    Args:
        spec: the source.
        root: the folder that relative paths in it start from.
        tell: called with how the rows were read.

    Raises:
        UserError: the data are missing, or the sides of a pair answer different prompts.
    """
    made = [_pair(row, spec, at) for at, row in enumerate(_read(spec, root, PAIRS, tell))]
    pairs = [pair for pair, _ in made]
    _same_kind([pair["prompt"] for pair in pairs], spec)
    tell(_sentence(pairs[0]["prompt"], [how for _, how in made], spec))
    return pairs


def last_answers(pairs: Sequence[Row], side: str) -> tuple[list[Prompt], list[str]]:
    """Return prompts and responses of one side of pairs; of an answer of several turns the last is the response.

    Args:
        pairs: as `read_pairs` returns them, answers with nothing but texts.
        side: "chosen" or "rejected".
    """
    prompts, responses = [], []
    for row in pairs:
        *before, last = row[side] if isinstance(row[side], list) else [row[side]]
        prompts.append([*row["prompt"], *before] if before else row["prompt"])
        responses.append(last if isinstance(last, str) else last["content"])
    return prompts, responses


def read_demonstrations(spec: DataSpec, root: Path = Path(), tell: Tell = silent) -> list[Row]:
    """Return rows to be imitated: messages (with `tools`, where a row has them), prompt and completion, or text.

    Args:
        spec: the source.
        root: the folder that relative paths in it start from.
        tell: called with how the rows were read.

    Raises:
        UserError: the data are missing, or a row has none of these forms.
    """
    rows = []
    for at, row in enumerate(_read(spec, root, DEMONSTRATIONS, tell, tools=True)):
        made = {**row, "messages": row["conversations"]} if "conversations" in row else dict(row)
        made.pop("conversations", None)
        rows.append(_demonstration(made, spec, at))
    firsts = [row.get("prompt", row.get("messages", row.get("text"))) for row in rows]
    _same_kind(firsts, spec)
    tell(_sentence(firsts[0], [""], spec))
    return rows


def _read(spec: DataSpec, root: Path, layouts: Layouts, tell: Tell, tools: bool = False) -> list[Row]:
    rows = read_rows(spec, layouts, root, beside=(_SYSTEM, _TOOLS, _SETTINGS))
    source, systems = _name(spec), 0
    for at, row in enumerate(rows):
        if isinstance(row.get(_TOOLS), str):
            row[_TOOLS] = _parsed(row[_TOOLS], f"{source}, row {at}")
        chat = spec.chat or any(isinstance(value, list) for key, value in row.items() if key not in (_TOOLS, _SETTINGS))
        if chat and row.get(_SETTINGS):
            raise fail(
                "a row has settings of the chat template",
                where=f"{source}, row {at}: `{_SETTINGS}`",
                got=repr(row[_SETTINGS])[:120],
                remedy="they belong to the project, for all rows: `generation: {chat_template_kwargs: …}`",
            )
        if chat and row.get(_TOOLS) and not tools:
            raise fail(
                "a row has tools, which only SFT can show a model",
                where=f"{source}, row {at}: `{_TOOLS}`",
                got=repr(row[_TOOLS])[:120],
                remedy="leave such rows out with a row function, or put the tools into a system turn",
            )
        row.pop(_SETTINGS, None)
        if not chat:
            row.pop(_TOOLS, None)
            systems += row.pop(_SYSTEM, None) is not None
    if systems:
        tell(f"rows of {source}: {systems} have a system turn in a column, which texts do not; `chat: true` reads it")
    return rows


def _parsed(tools: str, where: str) -> Any:
    try:
        return json.loads(tools)
    except ValueError as error:
        raise fail("`tools` is no JSON", where=where, got=tools[:120]) from error


def _prompt(row: Row, spec: DataSpec, at: int) -> Prompt:
    """Return the prompt of a row that holds no pair."""
    key = next(key for key in ("prompt", "messages", "conversations") if key in row)
    if "messages" in row and isinstance(row.get("prompt"), str) and isinstance(row["messages"], list):
        # The prompt as a text beside the chat that it opens, as in UltraChat.
        key = "messages" if any(_alike(turn, row["prompt"]) for turn in row["messages"]) else "prompt"
    value = row[key]
    if key != "prompt":
        value = _turns(value, spec, at)
        value = value[:-1] if value[-1]["role"] == "assistant" else value
    prompt = _as_chat(value, row, spec)
    _check_answerable(prompt, spec, at)
    return prompt


def _pair(row: Row, spec: DataSpec, at: int) -> tuple[Row, str]:
    """Return prompt, chosen and rejected of a row, and where its prompt was found."""
    sides: list[Any] = [row["chosen"], row["rejected"]]
    given: Any = row.get("prompt", row.get("conversations"))
    if given is None and "messages" in row and _as_answer(sides[0])[0]["role"] == "assistant":
        given = row["messages"]
    prompt: Prompt
    if any(isinstance(one, list) for one in (*sides, given)):
        prompt, answers, how = _chat_pair(given, sides, spec, at)
    elif given and all(side.startswith(given) and len(side) > len(given) for side in sides):
        spoken = all(side.startswith(_ASSISTANT, len(given)) for side in sides)
        cut = len(given) + (len(_ASSISTANT) if spoken else 0)
        prompt, answers, how = sides[0][:cut], [side[cut:] for side in sides], _REPEATED
    elif given is not None:
        prompt, answers, how = given, sides, ""
    else:
        prompt, answers, how = _text_pair(sides, spec, at)
    chat = _as_chat(prompt, row, spec)
    if isinstance(chat, list):
        # An answer that follows "Assistant:" may hold further turns.
        spoken = isinstance(prompt, str) and prompt.endswith(_ASSISTANT)
        answers = [_spoken(_ASSISTANT + answer) if spoken else _as_answer(answer) for answer in answers]
        _check_speakers(answers, spec, at)
    _check_answerable(chat, spec, at)
    return {"prompt": chat, "chosen": answers[0], "rejected": answers[1]}, how


def _chat_pair(given: Any, sides: Sequence[Any], spec: DataSpec, at: int) -> tuple[Messages, list[Any], str]:
    """Return the parts of a pair of which one at least is a chat."""
    turns = [_as_answer(side) for side in sides]
    if isinstance(given, list):
        own = [turn for turn in given if turn["role"] != "system"]
        starts = [_after(side, own) for side in turns]
        if all(start is not None for start in starts):
            # Whole chats beside their prompt; a system's turn may stand in one place only.
            longer = turns[0][: starts[0]]
            prompt = longer if len(longer) > len(given) else given
            return prompt, [side[start:] for side, start in zip(turns, starts, strict=True)], _REPEATED
        return given, turns, ""
    if given and all(side[0]["role"] == "assistant" for side in turns):
        return [{"role": "user", "content": given}], turns, ""
    shared = sum(1 for _ in takewhile(lambda both: _same(*both), zip(*turns, strict=False)))
    if shared == min(map(len, turns)):
        # One side ends where the other goes on, or both are the same: the last answer is theirs.
        shared = max((at for at, turn in enumerate(turns[0][:shared]) if turn["role"] == "assistant"), default=0)
    first = turns[0][:shared]
    if not first or any(len(side) <= shared for side in turns):
        raise _begin_differently(sides, spec, at)
    if given and not any(_alike(turn, given) for turn in first):
        raise fail(
            "the prompt is not among the turns that chosen and rejected begin with",
            where=f"{_name(spec)}, row {at}",
            expected=f"a user's turn with the text of `prompt`: {given[:80]!r}",
            got=repr(first)[:160],
            remedy="leave the column out with a row function, if the turns are right",
        )
    return first, [side[shared:] for side in turns], "prompt taken from the first turns of chosen"


def _after(side: Messages, turns: Messages) -> int | None:
    """Return where an answer begins in a chat that repeats some turns, after a system's or not; None in another."""
    skipped = 1 if side[0]["role"] == "system" else 0
    own = side[skipped : skipped + len(turns)]
    same = len(own) == len(turns) < len(side) - skipped and all(map(_same, own, turns))
    return skipped + len(turns) if same and turns else None


def _text_pair(sides: Sequence[str], spec: DataSpec, at: int) -> tuple[str, list[str], str]:
    """Return the parts of a pair of texts without a prompt: it ends at the assistant's turn, or where words differ."""
    common = os.path.commonprefix(list(sides))
    cut, how = common.rfind(_ASSISTANT), "prompt taken up to the last `Assistant:` that both sides have"
    if cut >= 0:
        cut += len(_ASSISTANT)
    else:
        cut, how = _word_border(common, sides), "prompt taken from the words that both sides begin with"
    if cut <= 0 or sides[0] == sides[1]:
        raise _begin_differently(sides, spec, at)
    return common[:cut], [side[cut:] for side in sides], how


def _word_border(common: str, sides: Sequence[str]) -> int:
    """Return where the last word begins that is not equal in both texts, with the space before it."""
    inside = any(side[len(common) :][:1].strip() for side in sides)
    kept = re.sub(r"\S+$", "", common) if inside else common
    return len(kept.rstrip()) if kept.strip() else 0


def _begin_differently(sides: Sequence[Any], spec: DataSpec, at: int) -> UserError:
    return fail(
        "the two sides of a pair begin differently" if sides[0] != sides[1] else "the two sides of a pair are the same",
        where=f"{_name(spec)}, row {at}",
        expected="a prompt of its own, or one that both sides begin with",
        got=f"{str(sides[0])[:80]!r} and {str(sides[1])[:80]!r}",
        remedy="leave such rows out with a row function",
    )


def _turns(value: Any, spec: DataSpec, at: int) -> Messages:
    """Return the turns of a column of messages.

    Raises:
        UserError: it holds a text.
    """
    if isinstance(value, str):
        what = "a text in a column of messages"
        raise fail(what, where=f"{_name(spec)}, row {at}", expected="a list of turns", got=repr(value)[:120])
    turns: Messages = value
    return turns


def _demonstration(row: Row, spec: DataSpec, at: int) -> Row:
    if "prompt" in row:
        prompt = _as_chat(row["prompt"], row, spec, chat=isinstance(row["completion"], list))
        completion = _as_answer(row["completion"]) if isinstance(prompt, list) else row["completion"]
        made: Row = {"prompt": prompt, "completion": completion}
    elif "messages" in row:
        made = {"messages": _as_chat(_turns(row["messages"], spec, at), row, spec)}
    elif spec.chat:
        raise fail(
            "whole texts are no turns of a chat",
            where=f"{_name(spec)}, row {at}",
            expected="rows of messages, or of prompt and completion",
            got="a text, and `chat: true`",
            remedy="set `chat: false`, or make messages with a row function",
        )
    else:
        made = {"text": row["text"]}
    return {**made, **({_TOOLS: row[_TOOLS]} if row.get(_TOOLS) else {})}


def _as_chat(prompt: Prompt, row: Row, spec: DataSpec, chat: bool = False) -> Prompt:
    """Return a prompt as turns where the data are chats, after a system turn where one is declared."""
    if isinstance(prompt, str):
        if not (spec.chat or chat):
            return prompt
        prompt = _turns_of(prompt)
    system = row.get(_SYSTEM) if isinstance(row.get(_SYSTEM), str) else spec.system
    if system is None or (prompt and prompt[0]["role"] == "system"):
        return prompt
    return [{"role": "system", "content": system}, *prompt]


def _turns_of(text: str) -> Messages:
    """Return the turns of a text: those of a human and an assistant where it is written so, or one of the user."""
    if not re.match(r"\s*Human:", text) or _ASSISTANT not in text:
        return [{"role": "user", "content": text}]
    turns = _spoken(f"\n\n{text.lstrip()}")
    # "Assistant:" at the end is where the answer goes.
    return turns if turns[-1]["content"] else turns[:-1]


def _spoken(text: str) -> Messages:
    """Return the turns of a text that begins with one."""
    _, *parts = _TURN.split(text)
    said = [part.strip() for part in parts[1::2]]
    speakers = ["user" if speaker == "Human" else "assistant" for speaker in parts[::2]]
    return [{"role": who, "content": what} for who, what in zip(speakers, said, strict=True)]


def _as_answer(value: Any) -> Messages:
    if isinstance(value, list):
        return value
    return [{"role": "assistant", "content": value}]


def _same(one: Any, two: Any) -> bool:
    """Return whether two turns say the same, whatever other facts they hold."""
    return one == two or (
        one["role"] == two["role"] and isinstance(two["content"], str) and _alike(one, two["content"])
    )


def _alike(turn: Any, text: str) -> bool:
    return isinstance(turn["content"], str) and turn["content"].strip() == text.strip()


def _check_speakers(answers: Sequence[Messages], spec: DataSpec, at: int) -> None:
    """Refuse an answer that the assistant does not begin and end."""
    for answer in answers:
        if not answer or {answer[0]["role"], answer[-1]["role"]} != {"assistant"}:
            raise fail(
                "an answer that is not the assistant's",
                where=f"{_name(spec)}, row {at}",
                expected="turns that begin and end with the assistant's",
                got=repr(answer)[:160] if answer else "no turns",
                remedy="leave such rows out with a row function",
            )


def _check_answerable(prompt: Prompt, spec: DataSpec, at: int) -> None:
    if isinstance(prompt, str) or (prompt and prompt[-1]["role"] not in ("assistant", "system")):
        return
    raise fail(
        "a chat that nobody has to answer",
        where=f"{_name(spec)}, row {at}",
        expected="a prompt whose last turn is the user's, or a tool's",
        got=repr(prompt[-1:])[:160] if prompt else "no turns before the answer",
        remedy="leave such rows out with a row function",
    )


def _same_kind(values: Sequence[Any], spec: DataSpec) -> None:
    """Refuse data of which some rows are chats and others texts: a trainer takes all for what the first is."""
    kinds = [isinstance(value, list) for value in values]
    if len(set(kinds)) > 1:
        at = kinds.index(not kinds[0])
        raise fail(
            "some rows are chats, others texts",
            where=f"{_name(spec)}, row {at}",
            expected="a chat, as row 0 has it" if kinds[0] else "a text, as row 0 has it",
            got=repr(values[at])[:120],
            remedy="set `chat: true`, which makes turns of texts",
        )


def _sentence(first: Any, ways: Sequence[str], spec: DataSpec) -> str:
    """Return how the rows were read, for the log."""
    kind = "chats" if is_chat(first) else "texts"
    made = "texts as turns of chats" if spec.chat else kind
    system = ["with the declared system turn"] if spec.system else []
    return ", ".join([f"rows of {_name(spec)}: {made}", *system, *dict.fromkeys(way for way in ways if way)])


def _name(spec: DataSpec) -> str:
    return spec.file or f"{spec.dataset} ({spec.split})"

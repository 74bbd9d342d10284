"""Reads prompts, preference pairs and demonstrations from rows of any published format.

Recipes and the sweep read rows here. The rows are all texts or all chats; one sentence reports how.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rewarded_lines.config import DataSpec
from rewarded_lines.data.messages import ASSISTANT, Messages, Prompt, as_answer, as_turns, holds_list, split_turns
from rewarded_lines.data.pair_parts import has_text, split_pair
from rewarded_lines.data.row_files import describe_files
from rewarded_lines.data.rows import COLUMNS, Layouts, Row, Tell, read_rows, silent
from rewarded_lines.errors import fail
from rewarded_lines.references import local_path

PAIRS: Layouts = [
    ("prompt", "chosen", "rejected"), ("conversations", "chosen", "rejected"), ("messages", "chosen", "rejected"),
    ("chosen", "rejected"),
]  # fmt: skip
PROMPTS: Layouts = [*PAIRS, ("prompt", "messages"), ("prompt",), ("messages",), ("conversations",)]
DEMONSTRATIONS: Layouts = [("messages",), ("prompt", "completion"), ("conversations",), ("text",)]
# Columns beside the turns of a chat.
_SYSTEM, _TOOLS, _SETTINGS, _IMAGES = "system", "tools", "chat_template_kwargs", "images"
# A name of data for the system turn, which may also be a note on how the data were made.
_UNREAD = "system_prompt"
# Keys of turns, 0 or false where a turn is not to be trained on: of OpenAI, Axolotl, ms-swift.
_TRAINED = ("weight", "train", "loss")
_LEAVE_OUT = "leave such rows out with a row function"


def read_prompts(spec: DataSpec, root: Path = Path(), tell: Tell = silent) -> list[Row]:
    """Return a row for each prompt of a source: the prompt, and the columns beside it. All are texts, or all chats.

    A pair or a demonstration gives its prompt, a whole chat the turns before its last answer.
    """
    read = _read(spec, root, PROMPTS, tell)
    made = [
        _pair(row, spec, where) if "chosen" in row else ({"prompt": _prompt(row, spec, where)}, "")
        for where, row in read
    ]
    rows = _reported(made, spec, tell)
    return [{"prompt": one["prompt"], COLUMNS: row[COLUMNS]} for one, (_, row) in zip(rows, read, strict=True)]


def read_pairs(spec: DataSpec, root: Path = Path(), tell: Tell = silent) -> list[Row]:
    """Return rows of prompt, chosen and rejected: three texts, or three lists of turns."""
    made = [_pair(row, spec, where) for where, row in _read(spec, root, PAIRS, tell)]
    rows = _reported(made, spec, tell)
    if ties := sum(row["chosen"] == row["rejected"] for row in rows):
        tell(f"rows of {_name(spec)}: {ties} of {len(rows)} pairs have the same answer twice, and teach nothing")
    return rows


def read_demonstrations(spec: DataSpec, root: Path = Path(), tell: Tell = silent) -> list[Row]:
    """Return rows for SFT: messages (with `tools` if given), prompt and completion, or text."""
    rows = _read(spec, root, DEMONSTRATIONS, tell, tools=True)
    made = [(_demonstration(row, spec, where), "") for where, row in rows]
    for (where, row), (one, _) in zip(rows, made, strict=True):
        _check_wanted(one, row[COLUMNS], where)
    found = _reported(made, spec, tell)
    if empty := sum(map(_is_empty, found)):
        tell(f"rows of {_name(spec)}: {empty} of {len(found)} answers are empty, and teach the model to say nothing")
    return found


def last_answers(pairs: Sequence[Row], side: str) -> tuple[list[Prompt], list[str]]:
    """Return the prompts and responses of one side, "chosen" or "rejected".

    If an answer has several turns, the last is the response. Every turn must hold only text.
    """
    prompts, responses = [], []
    for row in pairs:
        *before, last = row[side] if isinstance(row[side], list) else [row[side]]
        prompts.append([*row["prompt"], *before] if before else row["prompt"])
        responses.append(last if isinstance(last, str) else last["content"])
    return prompts, responses


def _read(spec: DataSpec, root: Path, layouts: Layouts, tell: Tell, tools: bool = False) -> list[tuple[str, Row]]:
    """Return places and rows; refuse chats with template settings or (without `tools`) tools."""
    made, systems, unread = [], 0, 0
    if spec.file and (files := describe_files(local_path(spec.file, root), spec.split)):
        tell(f"rows of {_name(spec)}: {files}")
    for at, row in enumerate(read_rows(spec, layouts, root)):
        where, beside = f"{_name(spec)}, row {at}", row[COLUMNS]
        row |= {name: beside[name] for name in (_SYSTEM, _TOOLS, _SETTINGS, _IMAGES) if beside.get(name)}
        if spec.chat or any(isinstance(value, list) for key, value in row.items() if key not in (_TOOLS, _IMAGES)):
            unread += bool(beside.get(_UNREAD)) and _SYSTEM not in row
        else:
            row.pop(_TOOLS, None)
            row.pop(_SETTINGS, None)
            systems += row.pop(_SYSTEM, None) is not None
        _check_beside(row, where, tools)
        made.append((where, row))
    if unread:
        more = f"`columns: {{{_SYSTEM}: {_UNREAD}}}` makes it their system turn"
        tell(f"rows of {_name(spec)}: {unread} have a column `{_UNREAD}`, which is not read; {more}")
    if systems:
        tell(
            f"rows of {_name(spec)}: {systems} have a system turn in a column, which texts do not use; "
            "`chat: true` reads it"
        )
    return made


def _check_beside(row: Row, where: str, tools: bool) -> None:
    """Refuse images, settings of a template and, without `tools`, tools; read tools that are JSON."""
    if isinstance(row.get(_TOOLS), str):
        try:
            row[_TOOLS] = json.loads(row[_TOOLS])
        except ValueError as error:
            raise fail("`tools` is not JSON", where=where, got=row[_TOOLS][:120]) from error
    for key, what, remedy in (
        (_IMAGES, "a row has images; models and rewards here read texts", _LEAVE_OUT),
        (
            _SETTINGS,
            "a row has settings of the chat template",
            "they belong to the project, for all rows: `generation: {chat_template_kwargs: …}`",
        ),
        (
            "" if tools else _TOOLS,
            "a row has tools, which only SFT can show a model",
            "leave such rows out with a row function, or put the tools into a system turn",
        ),
    ):
        if row.get(key):
            raise fail(what, where=f"{where}: `{key}`", got=repr(row[key])[:120], remedy=remedy)


def _reported(made: Sequence[tuple[Row, str]], spec: DataSpec, tell: Tell) -> list[Row]:
    """Return the rows, and report how they were read; refuse a mixture of chats and texts.

    A trainer treats every row like the first one.
    """
    rows = [row for row, _ in made]
    firsts = [row.get("prompt", row.get("messages", row.get("text"))) for row in rows]
    chats = [isinstance(first, list) for first in firsts]
    if len(set(chats)) > 1:
        at = chats.index(not chats[0])
        raise fail(
            "some rows are chats, others texts",
            where=f"{_name(spec)}, row {at}",
            expected="a chat, like row 0" if chats[0] else "a text, like row 0",
            got=repr(firsts[at])[:120],
            remedy="set `chat: true`, which makes turns of texts",
        )
    if all(map(holds_list, firsts)):
        raise fail(
            "the prompts are lists of texts in JSON",
            where=_name(spec),
            expected="texts, or turns of chats",
            got=repr(firsts[0])[:120],
            remedy="make turns of them with a row function; for LMSYS's votes "
            "`rows: rewarded_lines.data.published_rows:arena`",
        )
    kind = "texts as turns of chats" if spec.chat else "chats" if chats[0] else "texts"
    system = ["with the declared system turn"] if spec.system else []
    ways = dict.fromkeys(how for _, how in made if how)
    tell(", ".join([f"rows of {_name(spec)}: {kind}", *system, *ways]))
    return rows


def _prompt(row: Row, spec: DataSpec, where: str) -> Prompt:
    key = next(key for key in ("prompt", "messages", "conversations") if key in row)
    if "messages" in row and isinstance(row.get("prompt"), str) and isinstance(row["messages"], list):
        # UltraChat repeats the first turn of each chat as a text in `prompt`.
        key = "messages" if any(has_text(turn, row["prompt"]) for turn in row["messages"]) else "prompt"
    value = row[key]
    if key != "prompt":
        value = _turns(value, where)
        value = value[:-1] if value[-1]["role"] == "assistant" else value
    prompt = _as_chat(value, row, spec)
    _check_answerable(prompt, where)
    return prompt


def _pair(row: Row, spec: DataSpec, where: str) -> tuple[Row, str]:
    """Return prompt, chosen and rejected of a row, and how the prompt was found."""
    prompt, answers, how = split_pair(row, where)
    chat = _as_chat(prompt, row, spec)
    if isinstance(chat, list):
        # An answer that follows "Assistant:" may hold further turns.
        marked = isinstance(prompt, str) and prompt.endswith(ASSISTANT)
        answers = [split_turns(ASSISTANT + one) if marked else as_answer(one) for one in answers]
        for answer in answers:
            if not answer or {answer[0]["role"], answer[-1]["role"]} != {"assistant"}:
                raise fail(
                    "an answer that is not the assistant's",
                    where=where,
                    expected="turns that begin and end with the assistant's",
                    got=repr(answer)[:160] if answer else "no turns",
                    remedy=_LEAVE_OUT,
                )
    _check_answerable(chat, where)
    return {"prompt": chat, "chosen": answers[0], "rejected": answers[1]}, how


def _demonstration(row: Row, spec: DataSpec, where: str) -> Row:
    messages = row.get("conversations", row.get("messages"))
    made: Row
    if "prompt" in row:
        prompt = _as_chat(row["prompt"], row, spec, chat=isinstance(row["completion"], list))
        completion = as_answer(row["completion"]) if isinstance(prompt, list) else row["completion"]
        made = {"prompt": prompt, "completion": completion}
    elif messages is not None:
        made = {"messages": _as_chat(_turns(messages, where), row, spec)}
    elif spec.chat:
        raise fail(
            "a whole text has no turns of a chat",
            where=where,
            expected="rows of messages, or of prompt and completion",
            got="a text, and `chat: true`",
            remedy="set `chat: false`, or make messages with a row function",
        )
    else:
        made = {"text": row["text"]}
    return made | ({_TOOLS: row[_TOOLS]} if row.get(_TOOLS) else {})


def _check_wanted(made: Row, columns: Row, where: str) -> None:
    """Refuse a demonstration of a bad answer (KTO), of turns not to be trained on, or of no answer."""
    answers = [turn for turn in made.get("completion") or made.get("messages") or () if isinstance(turn, dict)]
    own = [turn for turn in answers if turn["role"] == "assistant"]
    what, got, remedy = "", answers[-1:], _LEAVE_OUT
    if "completion" in made and str(columns.get("label")).lower() == "false":
        what, got = "an answer that is marked as a bad one", [{"label": False}]
    elif unwanted := [turn for turn in own if any(turn.get(key) in (0, False) for key in _TRAINED)]:
        what, got = "an assistant's turn that is marked as not to be trained on", unwanted
        remedy = "make `prompt` and `completion` of the turns with a row function: only the completion is trained on"
    elif answers and not own:
        what = "a demonstration without an answer"
    if what:
        expected = "what the model shall learn to say"
        raise fail(what, where=where, expected=expected, got=repr(got)[:160], remedy=remedy)


def _is_empty(made: Row) -> bool:
    """Return whether a demonstration ends with an answer without text or calls."""
    answer = made.get("completion", made.get("messages", made.get("text")))
    turn = answer[-1] if isinstance(answer, list) else {"content": answer}
    return not (turn["content"] or "").strip() and not turn.get("tool_calls")


def _as_chat(prompt: Prompt, row: Row, spec: DataSpec, chat: bool = False) -> Prompt:
    """Return a prompt as turns if the data are chats, after the declared system turn."""
    if isinstance(prompt, str):
        if not (spec.chat or chat):
            return prompt
        prompt = _text_turns(prompt)
    system = row.get(_SYSTEM) if isinstance(row.get(_SYSTEM), str) else spec.system
    if system is None or (prompt and prompt[0]["role"] == "system"):
        return prompt
    return [{"role": "system", "content": system}, *prompt]


def _text_turns(text: str) -> Messages:
    """Return the turns of a text: those after "Human:" and "Assistant:", else one user's turn."""
    if not re.match(r"\s*Human:", text) or ASSISTANT not in text:
        return as_turns(text)
    turns = split_turns(f"\n\n{text.lstrip()}")
    # The answer goes after an "Assistant:" at the end.
    return turns if turns[-1]["content"] else turns[:-1]


def _turns(value: Any, where: str) -> Messages:
    """Return a column of messages; refuse a text in it."""
    if not isinstance(value, str):
        return list(value)
    what = "a text in a column of messages"
    raise fail(what, where=where, expected="a list of turns", got=repr(value)[:120])


def _check_answerable(prompt: Prompt, where: str) -> None:
    if isinstance(prompt, str) or (prompt and prompt[-1]["role"] not in ("assistant", "system")):
        return
    raise fail(
        "a chat that ends without a question",
        where=where,
        expected="a prompt whose last turn is the user's, or a tool's",
        got=repr(prompt[-1:])[:160] if prompt else "no turns before the answer",
        remedy=_LEAVE_OUT,
    )


def _name(spec: DataSpec) -> str:
    return spec.file or f"{spec.dataset} ({spec.split})"

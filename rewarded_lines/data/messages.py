"""Messages of a chat: read whole or refused."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from typing import Any

from rewarded_lines.errors import fail

Message = dict[str, Any]
Messages = list[Message]
# A text that the model continues, or the turns of a chat that it answers.
Prompt = str | Messages

# Speakers of turns with `from` and `value` (ShareGPT), and their roles.
_SPEAKERS = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant",
    "model": "assistant", "function_call": "assistant", "system": "system", "tool": "tool", "observation": "tool",
    "function_response": "tool",
}  # fmt: skip
# The same words where they stand as roles, which no chat template knows.
_ROLES = {name: _SPEAKERS[name] for name in ("human", "gpt", "chatgpt")}
# Keys that belong to a turn's content. Templates show no other keys (a date, a language).
_CALLS = ("tool_calls", "function_call")
CONTENT_KEYS = ("name", *_CALLS, "reasoning_content", "reasoning", "thinking", "tools", "documents")
# The turns of a single text, as in Anthropic's hh-rlhf.
ASSISTANT = "\n\nAssistant:"
# The beginning of turns that are written as a text, and of those that Python or numpy wrote.
_WRITTEN, _PRINTED = re.compile(r"\s*\[\s*\{"), re.compile(r"\s*\[\s*\{'(role|content|from|value)':")
_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")


def is_chat(value: Any) -> bool:
    """Return whether a value is one message, or a list of messages: mappings with a speaker."""
    several = [value] if isinstance(value, Mapping) else value
    if not isinstance(several, (list, tuple)) or not several:
        return False
    return all(isinstance(one, Mapping) and isinstance(one.get("role", one.get("from")), str) for one in several)


def written_chat(text: str, where: str) -> Messages | None:
    """Return the turns that a text holds as JSON or as Python prints them, as CSV files do; None for other texts."""
    for read in (json.loads, ast.literal_eval) if _WRITTEN.match(text) else ():
        try:
            value = read(text.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        return list(value) if is_chat(value) else None
    if not _PRINTED.match(text):
        return None
    raise fail(
        "a text that looks like the turns of a chat, but is not readable as such",
        where=where,
        expected='JSON such as [{"role": "user", "content": "…"}], or a text of another kind',
        got=repr(text[:120]),
        remedy="write the data as Parquet or JSON lines, which keep lists; numpy's lists in a CSV file have no commas",
    )


def holds_list(prompt: Any) -> bool:
    """Return whether a prompt is a list of texts in JSON."""
    text = str(prompt if isinstance(prompt, str) else prompt[-1]["content"])
    try:
        found = json.loads(text) if text.startswith("[") else None
    except (ValueError, RecursionError):
        return False
    return isinstance(found, list) and bool(found) and all(isinstance(one, str) for one in found)


def as_turns(prompt: Prompt) -> Messages:
    """Return a prompt as turns of a chat: a text becomes the user's turn."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def as_answer(value: str | Messages) -> Messages:
    """Return an answer as turns of a chat: a text becomes the assistant's turn."""
    return [{"role": "assistant", "content": value}] if isinstance(value, str) else value


def split_turns(text: str) -> Messages:
    """Return the turns of a text that begins with "\\n\\nHuman:" or "\\n\\nAssistant:"."""
    _, *parts = _TURN.split(text)
    turns = zip(parts[::2], parts[1::2], strict=True)
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[speaker], "content": content.strip()} for speaker, content in turns]


def read_messages(value: Any, where: str) -> Messages:
    """Return the messages of a row with every key but null ones, with which Parquet fills gaps.

    Text parts of a content are joined. `from` and `value` become `role` and `content`, also for calls of a function.
    """
    several = [value] if isinstance(value, Mapping) else value
    return [_read(one, where) for one in several]


def check_text(value: Any, role: str, where: str) -> None:
    """Refuse halves of surrogate pairs: JSON can hold them, but no tokenizer reads them."""
    try:
        json.dumps(value, ensure_ascii=False, skipkeys=True, default=str).encode()
    except UnicodeEncodeError as error:
        what = f"column `{role}` holds characters that are not text"
        raise fail(what, where=where, got=str(error)) from error


def more_than_text(messages: Prompt) -> str:
    """Return a key that is lost if only the texts of the turns are read, or ""."""
    turns = [] if isinstance(messages, str) else messages
    return next((key for turn in turns for key in CONTENT_KEYS if turn.get(key)), "")


def _read(message: Mapping[str, Any], where: str) -> Message:
    made = {key: value for key, value in message.items() if value is not None}
    if "role" not in made:
        speaker = str(made.pop("from"))
        if speaker not in _SPEAKERS:
            what, known = f"unknown speaker `{speaker}`", ", ".join(_SPEAKERS)
            raise fail(what, where=where, expected=known, remedy="use a row function")
        made = {"role": _SPEAKERS[speaker], "content": made.pop("value", None), **made}
        if speaker == "function_call":
            made |= {"content": "", "tool_calls": _calls(made["content"], where)}
    made["role"] = _ROLES.get(made["role"], made["role"])
    content = made.get("content")
    if isinstance(content, (list, tuple)):
        content = "".join(_part_text(part, where) for part in content)
    if not isinstance(content, str) and not (content is None and any(made.get(key) for key in _CALLS)):
        raise fail(
            "a turn has no text",
            where=where,
            expected="`content`, a text or a list of text parts",
            got=repr(dict(message))[:120],
        )
    # Published chats with tool calls hold the key `content` with a null.
    return {**made, "content": content}


def _calls(text: Any, where: str) -> list[Message]:
    """Return the tool calls that LLaMA-Factory writes as JSON, one or a list."""
    try:
        calls = json.loads(text)
        several = calls if isinstance(calls, list) else [calls]
        functions = [{"name": one["name"], "arguments": one["arguments"]} for one in several]
    except (ValueError, TypeError, KeyError) as error:
        expected = 'JSON such as {"name": "look", "arguments": {"place": "Rome"}}'
        raise fail("not a function call", where=where, expected=expected, got=repr(text)[:120]) from error
    return [{"type": "function", "function": one} for one in functions]


def _part_text(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    kind, text = (part.get("type", "text"), part.get("text")) if isinstance(part, Mapping) else ("?", None)
    if kind not in ("text", "input_text", "output_text") or not isinstance(text, str):
        raise fail(
            f"a content part of the type `{kind}`",
            where=where,
            expected="parts of the type `text`: models and rewards here read texts",
            got=repr(part)[:120],
            remedy="leave such rows out with a row function",
        )
    return text

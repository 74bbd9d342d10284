"""Messages of a chat: read whole or refused, and checked against what a chat template shows of them."""

from __future__ import annotations

import ast
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from itertools import count
from typing import Any

from rewarded_lines.errors import Problem, UserError, fail

Message = dict[str, Any]
Messages = list[Message]
# A text that the model continues, or the turns of a chat that it answers.
Prompt = str | Messages

TODAY = datetime(2026, 1, 1)
"""The date that chat templates write; a sweep that goes on tomorrow must have the same prompts."""
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
_CONTENT_KEYS = ("name", *_CALLS, "reasoning_content", "reasoning", "thinking", "tools", "documents")
# What a text holds before the end of the thoughts, as reasoning models write them.
_THOUGHTS, _END_OF_THOUGHTS = "thoughts before </think>", "</think>"
_numbers = count()
# Whether a chat template shows only lists of parts, by its text.
_wants_parts: dict[str, bool] = {}
_PROBE = "a text"
# The turns to try with each key before the template counts as hiding it.
_TRIED = 16
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
    return next((key for turn in turns for key in _CONTENT_KEYS if turn.get(key)), "")


def check_template(tokenizer: Any, chats: Iterable[Messages], where: str) -> None:
    """Refuse chats if the chat template hides a part: a role, the text of turns, tool calls, reasoning, a name.

    Up to 16 turns are rendered with and without each such part. If the text never changes, the template hides it.
    A chat is cut after the turn with a key: templates drop the reasoning of earlier turns on purpose. So thoughts
    within a text count in the last turn only.
    """
    places: dict[str, list[tuple[Messages, int]]] = defaultdict(list)
    for chat in chats:
        for place, turn in enumerate(chat):
            thoughts = (
                [_THOUGHTS] if chat[place + 1 :] == [] and _END_OF_THOUGHTS in (turn.get("content") or "") else []
            )
            for what in [f"role: {turn['role']}", *filter(turn.get, ("content", *_CONTENT_KEYS)), *thoughts]:
                if len(places[what]) < _TRIED:
                    places[what].append((chat, place))
    hidden = [what for what, tried in places.items() if not any(_is_shown(tokenizer, *one, what) for one in tried)]
    if hidden:
        raise UserError(_hidden(what, tokenizer, where) for what in hidden)


def render(tokenizer: Any, chats: Sequence[Messages], **options: Any) -> Any:
    """Return `tokenizer.apply_chat_template(chats, **options)`, with a `UserError` if it fails.

    A template that shows texts only as lists of parts gets those. One that writes today's date writes `TODAY`, so that
    prompts are the same on every day.
    """
    from jinja2 import TemplateError

    if not getattr(tokenizer, "chat_template", None):
        raise fail(
            "the tokenizer has no chat template",
            where=str(tokenizer.name_or_path),
            expected="chat_template.jinja beside it, since the prompts are chats",
            remedy="set `chat: false` if the rows are texts, or give this tokenizer a template",
        )
    if "strftime_now" in str(tokenizer.chat_template):
        options["strftime_now"] = TODAY.strftime
    try:
        return tokenizer.apply_chat_template([for_template(tokenizer, chat) for chat in chats], **options)
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise fail(
            "the tokenizer's chat template fails on the chats",
            where=str(tokenizer.name_or_path),
            got=f"{type(error).__name__}: {error}",
            remedy="correct the template, or remove what it does not support (a system turn?)",
        ) from error


def for_template(tokenizer: Any, chat: Messages) -> Messages:
    """Return a chat as its template reads it: templates of models for images may show only lists of parts."""
    from jinja2 import TemplateError

    def shows(content: Any) -> bool:
        try:
            return _PROBE in tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError):
            return False

    template = str(tokenizer.chat_template)
    if template not in _wants_parts:
        _wants_parts[template] = not shows(_PROBE) and shows([{"type": "text", "text": _PROBE}])
    if not _wants_parts[template]:
        return chat
    return [{**turn, "content": [{"type": "text", "text": turn["content"] or ""}]} for turn in chat]


def with_settings(template: Any, settings: Mapping[str, Any]) -> Any:
    """Return a chat template, or several by name, that sets some variables itself for every caller."""
    if not settings or template is None:
        return template
    if isinstance(template, Mapping):
        return {name: with_settings(one, settings) for name, one in template.items()}
    assignments = "".join(f"{{%- set {name} = {_literal(value)} %}}" for name, value in settings.items())
    # Jinja drops a newline after a block tag, so an expression comes last.
    return assignments + "{{ '' }}" + template


def _literal(value: Any) -> str:
    """Return a value as a Jinja literal."""
    if isinstance(value, Mapping):
        pairs = (f"{_literal(str(key))}: {_literal(one)}" for key, one in value.items())
        return "{" + ", ".join(pairs) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return "none" if value is None else json.dumps(value, ensure_ascii=False)


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


def _is_shown(tokenizer: Any, chat: Messages, place: int, what: str) -> bool:
    before, turn = list(chat[:place]), chat[place]
    if what.startswith("role: "):
        # Needs the whole chat: some templates write the system turn beside the user's last turn only.
        return _rendered(tokenizer, chat) != _rendered(tokenizer, [*before, *chat[place + 1 :]])
    without = {key: value for key, value in turn.items() if key != what}
    if what == _THOUGHTS:
        without["content"] = turn["content"].rpartition(_END_OF_THOUGHTS)[2]
    elif what == "content":
        # Not an empty text, on which some templates fail.
        without["content"] = f"{turn['content']}x"
    elif without.get("content") is None:
        without["content"] = ""
    return _rendered(tokenizer, [*before, turn]) != _rendered(tokenizer, [*before, without])


def _rendered(tokenizer: Any, chat: Messages) -> str:
    """Return the text of a chat, or a text like no other if the template refuses the chat's order of turns."""
    try:
        return str(render(tokenizer, [chat], tokenize=False)[0]) if chat else ""
    except UserError as error:
        if not getattr(tokenizer, "chat_template", None):
            raise
        return f"{error} {next(_numbers)}"


def _hidden(what: str, tokenizer: Any, where: str) -> Problem:
    kind, _, role = what.partition(": ")
    return Problem(
        "the chat template leaves out " + (f"turns of the role `{role}`" if role else f"`{kind}`"),
        where=where,
        expected="a template that shows the model all of a chat",
        got=f"the template of {tokenizer.name_or_path}",
        remedy="remove them from the data with a row function, or name a template that shows them "
        "(`generation: {chat_template: FILE}` in the project)",
    )

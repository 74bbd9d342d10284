"""Messages of a chat: each is kept whole or refused, and a tokenizer's chat template must show all of it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rewarded_lines.errors import Problem, UserError, fail

Message = dict[str, Any]
Messages = list[Message]
# A text that the model goes on from, or the turns of a chat that it answers.
Prompt = str | Messages

# Who speaks, in rows that have `from` and `value` (ShareGPT).
_SPEAKERS = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant",
    "model": "assistant", "system": "system", "tool": "tool", "observation": "tool", "function_response": "tool",
}  # fmt: skip
# What a turn says beside its text. Other keys (a date, a language) are facts about it, which no template shows.
_SAID = ("name", "tool_calls", "function_call", "reasoning_content", "reasoning", "thinking", "tools", "documents")
_CALLS = ("tool_calls", "function_call")
# So many turns with a key are tried before the template is said not to show it.
_TRIED = 16


def is_chat(value: Any) -> bool:
    """Return whether a value has the form of messages: one mapping with a speaker, or a list of them."""
    several = [value] if isinstance(value, Mapping) else value
    if not isinstance(several, (list, tuple)) or not several:
        return False
    return all(isinstance(one, Mapping) and isinstance(one.get("role", one.get("from")), str) for one in several)


def read_messages(value: Any, where: str) -> Messages:
    """Return the messages of a row, every key kept; null ones, with which Parquet fills gaps, are left out.

    Content parts that are texts become one text. `from` and `value` become `role` and `content`.

    Args:
        value: what `is_chat` is true of.
        where: the row, for messages to the user.

    Raises:
        UserError: a turn has no content, parts that are no text, or an unknown speaker.
    """
    several = [value] if isinstance(value, Mapping) else value
    return [_read(one, where) for one in several]


def check_text(value: Any, role: str, where: str) -> None:
    """Refuse halves of a surrogate pair, which JSON can write and no tokenizer reads.

    Raises:
        UserError: naming the column.
    """
    for text in _texts(value):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise fail(f"column `{role}` holds what is no text", where=where, got=str(error)) from error


def more_than_text(messages: Prompt) -> str:
    """Return a key of some turn that a reading of the texts alone would lose, or ""."""
    return next((key for turn in messages if isinstance(turn, Mapping) for key in _SAID if turn.get(key)), "")


def check_template(tokenizer: Any, chats: Iterable[Messages], where: str) -> None:
    """Refuse chats of which the chat template leaves something out: a role, tool calls, reasoning, a name.

    Some chats that have such a thing are rendered with and without it. If the text is the same each time, the template
    does not know it, and the model would never see it. A turn's reasoning, calls and name are tried with that turn as
    the last one: templates drop the reasoning of earlier turns on purpose.

    Args:
        tokenizer: with a chat template.
        chats: whole conversations or prompts.
        where: whose data they are, for messages to the user.

    Raises:
        UserError: naming everything that the template leaves out.
    """
    tried: dict[str, int] = {}
    shown: set[str] = set()
    for chat in chats:
        for place, turn in enumerate(chat):
            for what in [f"role: {turn['role']}", *(key for key in _SAID if turn.get(key))]:
                if what in shown or tried.get(what, 0) >= _TRIED:
                    continue
                tried[what] = tried.get(what, 0) + 1
                if _is_shown(tokenizer, chat, place, what):
                    shown.add(what)
    hidden = [what for what in tried if what not in shown]
    if hidden:
        raise UserError(_hidden(what, tokenizer, where) for what in hidden)


def render(tokenizer: Any, chats: Sequence[Messages], **options: Any) -> Any:
    """Return what the tokenizer's chat template makes of chats; see `apply_chat_template`, whose options these are.

    Raises:
        UserError: the tokenizer has no chat template, or the template fails.
    """
    from jinja2 import TemplateError

    if not getattr(tokenizer, "chat_template", None):
        raise fail(
            "the tokenizer has no chat template",
            where=str(tokenizer.name_or_path),
            expected="chat_template.jinja beside it, since the prompts are chats",
            remedy="set `chat: false` if the rows are texts, or give this tokenizer a template",
        )
    try:
        return tokenizer.apply_chat_template(list(chats), **options)
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise fail(
            "the tokenizer's chat template fails on the chats",
            where=str(tokenizer.name_or_path),
            got=f"{type(error).__name__}: {error}",
            remedy="mend the template, or leave out what it does not know (a system turn?)",
        ) from error


def with_settings(template: Any, settings: Mapping[str, Any]) -> Any:
    """Return a chat template in which some variables are set, so that whoever renders it uses them.

    Args:
        template: Jinja, or several of them by name.
        settings: the variables, for instance `{"enable_thinking": False}`.
    """
    if not settings or template is None:
        return template
    if isinstance(template, Mapping):
        return {name: with_settings(one, settings) for name, one in template.items()}
    # The last tag is no block: Jinja would take the newline behind one away.
    return (
        "".join(f"{{%- set {name} = {_literal(value)} %}}" for name, value in settings.items()) + "{{ '' }}" + template
    )


def _literal(value: Any) -> str:
    """Return a value as Jinja writes it."""
    if isinstance(value, Mapping):
        return (
            "{"
            + ", ".join(f"{json.dumps(str(key), ensure_ascii=False)}: {_literal(one)}" for key, one in value.items())
            + "}"
        )
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return "none" if value is None else json.dumps(value, ensure_ascii=False)


def _read(message: Mapping[str, Any], where: str) -> Message:
    made = {key: value for key, value in message.items() if value is not None}
    if "role" not in made:
        speaker = str(made.pop("from"))
        if speaker not in _SPEAKERS:
            expected = ", ".join(_SPEAKERS)
            raise fail(f"unknown speaker `{speaker}`", where=where, expected=expected, remedy="use a row function")
        made = {"role": _SPEAKERS[speaker], "content": made.pop("value", None), **made}
    content = made.get("content")
    if isinstance(content, (list, tuple)):
        made["content"] = content = _joined(content, where)
    if not isinstance(content, str) and not (content is None and any(made.get(key) for key in _CALLS)):
        raise fail(
            "a turn has no text",
            where=where,
            expected="`content`, a text or a list of text parts",
            got=repr(dict(message))[:120],
        )
    if content is None:
        # As chats with tool calls are published: the key is there, and its value is null.
        made["content"] = None
    return made


def _joined(parts: Sequence[Any], where: str) -> str:
    texts = []
    for part in parts:
        content = part if isinstance(part, str) else part.get("text") if isinstance(part, Mapping) else None
        kind = "text" if isinstance(part, str) else part.get("type", "text") if isinstance(part, Mapping) else "?"
        if kind != "text" or not isinstance(content, str):
            raise fail(
                f"a content part of the type `{kind}`",
                where=where,
                expected="parts of the type `text`: models and rewards here read texts",
                got=repr(part)[:120],
                remedy="leave such rows out with a row function",
            )
        texts.append(content)
    return "".join(texts)


def _texts(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from _texts(one)
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _texts(one)


def _is_shown(tokenizer: Any, chat: Messages, place: int, what: str) -> bool:
    before, turn = list(chat[:place]), chat[place]
    if what.startswith("role: "):
        # In the whole chat: some templates write a system's turn beside the last user's only.
        return _rendered(tokenizer, chat) != _rendered(tokenizer, [*before, *chat[place + 1 :]])
    whole = _rendered(tokenizer, [*before, turn])
    without = {key: value for key, value in turn.items() if key != what}
    if without.get("content") is None:
        without["content"] = ""
    return whole != _rendered(tokenizer, [*before, without])


def _rendered(tokenizer: Any, chat: Messages) -> str:
    """Return the text of a chat; where the template refuses it (turns must alternate), that counts as another text."""
    try:
        return str(render(tokenizer, [chat], tokenize=False)[0]) if chat else ""
    except UserError as error:
        if not getattr(tokenizer, "chat_template", None):
            raise
        return f"{error} {len(chat)}"


def _hidden(what: str, tokenizer: Any, where: str) -> Problem:
    kind, _, role = what.partition(": ")
    return Problem(
        "the chat template leaves out " + (f"turns of the role `{role}`" if role else f"`{kind}`"),
        where=where,
        expected="a template that shows the model all of a chat",
        got=f"the template of {tokenizer.name_or_path}",
        remedy="take them out of the data with a row function, or name a template that shows them "
        "(`generation: {chat_template: FILE}` in the project)",
    )

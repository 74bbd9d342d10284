"""Chats as chat templates write them: rendered alike on every day, and checked for what a template leaves out."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from itertools import count
from typing import Any, NamedTuple

from rewarded_lines.data.messages import CONTENT_KEYS, Message, Messages
from rewarded_lines.errors import Problem, UserError, fail

TODAY = datetime(2026, 1, 1)
"""The date that chat templates write; a sweep that goes on tomorrow must have the same prompts."""
# What a text holds before the end of the thoughts, as reasoning models write them.
_THOUGHTS, _END_OF_THOUGHTS = "thoughts before </think>", "</think>"
_numbers = count()
# The turns to try with each key before the template counts as hiding it.
_TRIED = 16
_PROBE = "a text"
# What templates read, by their texts.
_forms: dict[str, _Form] = {}


def render(tokenizer: Any, chats: Sequence[Messages], **options: Any) -> Any:
    """Return `tokenizer.apply_chat_template(chats, **options)`, with a `UserError` if it fails.

    A template that writes today's date writes `TODAY`, so that prompts are the same on every day.
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


class _Form(NamedTuple):
    """What a chat template reads.

    Attributes:
        parts: it shows texts only as lists of parts, as templates of models for images may do.
        no_text: the content of a turn that has calls but no text.
        json_arguments: arguments of calls are JSON, which it adds to a text; others get mappings.
    """

    parts: bool
    no_text: str | None
    json_arguments: bool


def for_template(tokenizer: Any, chat: Messages) -> Messages:
    """Return a chat as its template reads it.

    Published chats often hold the arguments of tool calls as JSON, as OpenAI's API does. Most templates would quote
    that once more, and some would write "None" for a null beside calls. So they get mappings and an empty text, as
    from vLLM; those of DeepSeek need JSON and a null. A list without calls is left out, too.
    """
    template = str(tokenizer.chat_template)
    if template not in _forms:
        _forms[template] = _form_of(tokenizer)
    form = _forms[template]
    turns = [_with_calls(turn, form) if "tool_calls" in turn else turn for turn in chat]
    if not form.parts:
        return turns
    return [{**turn, "content": [{"type": "text", "text": turn["content"] or ""}]} for turn in turns]


def _form_of(tokenizer: Any) -> _Form:
    from jinja2 import TemplateError

    def text(*turns: Message) -> str:
        try:
            return str(tokenizer.apply_chat_template(list(turns), tokenize=False))
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError):
            return ""

    def shows_call(content: str | None, as_json: bool) -> bool:
        given = {_PROBE: 1}
        function = {"name": "look", "arguments": json.dumps(given) if as_json else given}
        call = {"id": "call00001", "type": "function", "function": function}
        made = text({"role": "user", "content": ""}, {"role": "assistant", "content": content, "tool_calls": [call]})
        # Python's own form of a mapping is no JSON.
        return _PROBE in made and f"'{_PROBE}'" not in made

    asked, parts = {"role": "user", "content": _PROBE}, [{"type": "text", "text": _PROBE}]
    wants_parts = _PROBE not in text(asked) and _PROBE in text({**asked, "content": parts})
    forms = ((content, as_json) for content in ("", None) for as_json in (False, True))
    return _Form(wants_parts, *next((one for one in forms if shows_call(*one)), ("", False)))


def _with_calls(turn: Message, form: _Form) -> Message:
    calls = turn["tool_calls"]
    if not calls:
        return {key: value for key, value in turn.items() if key != "tool_calls"}
    content = turn.get("content") or form.no_text
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        return {**turn, "content": content}
    return {**turn, "content": content, "tool_calls": [_call_for(call, form.json_arguments) for call in calls]}


def _call_for(call: Mapping[str, Any], as_json: bool) -> Mapping[str, Any]:
    """Return a call with its arguments as JSON, or as a mapping; what is no JSON of a mapping stays as it is."""
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _call_for(call["function"], as_json)}
    given = call.get("arguments")
    if isinstance(given, Mapping) and as_json:
        return {**call, "arguments": json.dumps(given, ensure_ascii=False)}
    if isinstance(given, str) and not as_json:
        with suppress(ValueError, RecursionError):
            if isinstance(found := json.loads(given), dict):
                return {**call, "arguments": found}
    return call


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
            for what in [f"role: {turn['role']}", *filter(turn.get, ("content", *CONTENT_KEYS)), *thoughts]:
                if len(places[what]) < _TRIED:
                    places[what].append((chat, place))
    hidden = [what for what, tried in places.items() if not any(_is_shown(tokenizer, *one, what) for one in tried)]
    if hidden:
        raise UserError(_hidden(what, tokenizer, where) for what in hidden)


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

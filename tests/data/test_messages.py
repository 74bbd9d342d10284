"""Messages are kept whole or refused, and a chat template must show all of them."""

import json
import sys
from contextlib import nullcontext

import pytest
from chat_forms import FORMS, make_tokenizer
from tiny_models import make_tokenizer as make_plain_tokenizer

from rewarded_lines.config import GenerationSpec
from rewarded_lines.data.chat_templates import check_template, render, with_settings
from rewarded_lines.data.messages import is_chat, read_messages
from rewarded_lines.errors import UserError

CALL = {"type": "function", "function": {"name": "look", "arguments": {"place": "rome"}}}
ASKED = {"role": "user", "content": "why"}


def said(content="so", **more):
    return {"role": "assistant", "content": content, **more}


@pytest.mark.parametrize(
    "message",
    [
        said(tool_calls=[CALL]),
        said(None, tool_calls=[CALL]),
        said(reasoning_content="it is so"),
        {"role": "tool", "content": "sunny", "name": "look", "tool_call_id": "1"},
        {**ASKED, "name": "ann"},
        {**ASKED, "weight": 0, "date": "2026-01-01"},
    ],
)
def test_every_key_is_kept(message):
    assert is_chat([message]) and read_messages([message], "row 0") == [message]


def test_gaps_are_no_keys_and_parts_of_text_are_one_text():
    parts = [{"type": "text", "text": "why ", "image": None}, {"type": "input_text", "text": "so"}]
    filled = {"role": "user", "content": parts, "tool_calls": None, "name": None}
    assert read_messages([filled], "row 0") == [{"role": "user", "content": "why so"}]
    shared = [{"from": "human", "value": "why"}, {"from": "gpt", "value": "so"}]
    assert read_messages(shared, "row 0") == [ASKED, said()]


@pytest.mark.parametrize(
    ("message", "what"),
    [
        ({"role": "user", "content": [{"type": "image", "image": "a.png"}]}, "`image`"),
        ({"role": "user", "content": None}, "no text"),
        ({"role": "user"}, "no text"),
        ({"role": "user", "content": 5}, "no text"),
        ({"from": "narrator", "value": "so"}, "unknown speaker `narrator`"),
    ],
)
def test_what_is_no_text_is_refused(message, what):
    with pytest.raises(UserError, match=what):
        read_messages([message], "row 0")


# What each form's template shows, by its own text.
SHOWS = {
    "llama3": {"tool_calls": True, "reasoning_content": False, "name": False, "tool": True},
    "qwen3": {"tool_calls": True, "reasoning_content": True, "name": False, "tool": True},
    "gemma3": {"tool_calls": False, "reasoning_content": False, "name": False},
    "phi": {"tool_calls": False, "reasoning_content": False, "name": False, "tool": True},
    "mistral": {"tool_calls": False, "reasoning_content": False, "name": False},
}
CHATS = {
    "tool_calls": [ASKED, said("", tool_calls=[CALL])],
    "reasoning_content": [ASKED, said(reasoning_content="it is so")],
    "name": [{**ASKED, "name": "ann"}, said()],
    "tool": [ASKED, said("", tool_calls=[CALL]), {"role": "tool", "content": "sunny"}],
}


@pytest.mark.parametrize(("form", "key"), [(form, key) for form in FORMS for key in SHOWS[form]])
def test_a_template_that_leaves_something_out_is_found(form, key):
    tokenizer = make_tokenizer(form)
    chats = CHATS["tool"][:1] + [said("so"), *CHATS["tool"][2:]] if key == "tool" and form == "phi" else CHATS[key]
    if SHOWS[form][key]:
        check_template(tokenizer, [chats], "rows")
        return
    with pytest.raises(UserError, match=f"leaves out `{key}`"):
        check_template(tokenizer, [chats], "rows")


def test_few_chats_are_kept_to_be_tried():
    chat = [ASKED, said()]

    def chats():
        yield from (chat for _ in range(1000))
        assert sys.getrefcount(chat) < 100

    check_template(make_tokenizer("qwen3"), chats(), "rows")


def test_reasoning_of_earlier_turns_is_the_templates_to_drop():
    history = [ASKED, said(reasoning_content="it is so"), ASKED]
    check_template(make_tokenizer("qwen3"), [history], "rows")


def test_a_template_without_system_turns_is_found():
    tokenizer = make_tokenizer("phi")
    tokenizer.chat_template = "{% for m in messages %}{% if m.role != 'system' %}{{ m.content }}{% endif %}{% endfor %}"
    for bos in ("", "{{ bos_token }}"):
        tokenizer.chat_template = bos + tokenizer.chat_template
        with pytest.raises(UserError, match="turns of the role `system`"):
            check_template(tokenizer, [[{"role": "system", "content": "be brief"}, ASKED]], "rows")
    check_template(tokenizer, [[ASKED, said()]], "rows")


@pytest.mark.parametrize("thinking", [True, False])
def test_settings_in_a_template_are_those_that_it_would_be_given(thinking):
    tokenizer, plain = make_tokenizer("qwen3"), make_tokenizer("qwen3")
    tokenizer.chat_template = with_settings(tokenizer.chat_template, {"enable_thinking": thinking})
    options = {"add_generation_prompt": True, "tokenize": False}
    assert tokenizer.apply_chat_template([ASKED], **options) == plain.apply_chat_template(
        [ASKED], enable_thinking=thinking, **options
    )


def test_a_system_turn_beside_the_last_users_is_shown_in_prompts_and_hidden_in_whole_chats():
    """Some templates of Mistral write it only if the last turn is the user's."""
    tokenizer = make_tokenizer("phi")
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' and loop.last and messages[0].role == 'system' %}"
        "{{ messages[0].content }}{% endif %}{% if m.role != 'system' %}{{ m.content }}{% endif %}{% endfor %}"
    )
    system = {"role": "system", "content": "be brief"}
    check_template(tokenizer, [[system, ASKED]], "rows")
    with pytest.raises(UserError, match="turns of the role `system`"):
        check_template(tokenizer, [[system, ASKED, said()]], "rows")


@pytest.mark.parametrize("value", [{"date": __import__("datetime").date(2024, 7, 26)}, {"enable-thinking": True}])
def test_settings_that_no_template_takes_are_refused(value):
    with pytest.raises(ValueError, match="quote it|not a variable's name"):
        GenerationSpec(chat_template_kwargs=value)


def test_settings_of_every_kind_reach_a_template():
    tokenizer = make_tokenizer("phi")
    settings = {"a": True, "b": None, "c": 'it\'s "so" 😀\n', "d": [1, 2.5, {"e": False}], "f": {"g": "é"}}
    template = "\n{{ [a, b, c, d, f] }}"
    tokenizer.chat_template = template
    wanted = tokenizer.apply_chat_template([ASKED], tokenize=False, **settings)
    tokenizer.chat_template = with_settings(template, settings)
    assert tokenizer.apply_chat_template([ASKED], tokenize=False) == wanted


# How SmolLM3, Llama 3.2 and gpt-oss write the date.
DATED = {
    "smollm3": "{%- set today = strftime_now('%d %B %Y') -%}{{ 'Today Date: ' ~ today }}",
    "llama": "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    "{%- set date_string = strftime_now('%d %b %Y') %}{%- else %}{%- set date_string = '26 Jul 2024' %}"
    "{%- endif %}{%- endif %}{{ 'Today Date: ' + date_string }}",
    "gpt-oss": "{%- macro head() -%}{{ 'Current date: ' + strftime_now('%Y-%m-%d') }}{%- endmacro -%}{{ head() }}",
}


@pytest.mark.parametrize(
    ("name", "date"), [("smollm3", "01 January 2026"), ("llama", "01 Jan 2026"), ("gpt-oss", "2026-01-01")]
)
def test_todays_date_is_the_same_every_day(name, date):
    tokenizer = make_plain_tokenizer()
    tokenizer.chat_template = DATED[name]
    assert render(tokenizer, [[ASKED]], tokenize=False)[0].endswith(f"ate: {date}")
    tokenizer.chat_template = with_settings(DATED[name], {"date_string": "5 May 2025"})
    pinned = "5 May 2025" if name == "llama" else date
    assert render(tokenizer, [[ASKED]], tokenize=False)[0].endswith(f"ate: {pinned}")


HIDES = "{% for m in messages %}{{ m.role }}<end>{% endfor %}"
PARTS = """{% for m in messages %}{{ m.role }}:
{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}<end>{% endfor %}"""
STRIPS = "{% for m in messages %}{{ m.role }}{{ m.content.split('</think>')[-1] }}<end>{% endfor %}"


@pytest.mark.parametrize(
    ("template", "chat", "hidden"),
    [
        (HIDES, [ASKED, said("yes")], "`content`"),
        # Of DeepSeek-R1's distilled models.
        (STRIPS, [ASKED, said("<think>why</think>yes")], "`thoughts before </think>`"),
        (STRIPS, [ASKED, said("<think>why</think>yes"), ASKED], ""),
        (STRIPS, [ASKED, said("yes")], ""),
        ("{{ raise_exception('never') }}", [ASKED, said("yes")], ""),
    ],
)
def test_a_template_must_show_the_text_of_turns_and_the_last_thoughts(template, chat, hidden):
    tokenizer = make_tokenizer("qwen3")
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=f"leaves out {hidden}") if hidden else nullcontext():
        check_template(tokenizer, [chat], "rows")


def test_a_template_that_reads_lists_of_parts_gets_them():
    """SmolVLM, Idefics 3 and Llama Guard show no text that is not in a list, and LLaVA-NeXT fails on one."""
    tokenizer, chat = make_tokenizer("qwen3"), [ASKED, said("yes")]
    for template in (PARTS, PARTS.replace("part.type == 'text'", "part.text + ''")):
        tokenizer.chat_template = template
        text = "user:\nwhy<end>assistant:\nyes<end>"
        assert render(tokenizer, [chat], tokenize=False) == [text]
        check_template(tokenizer, [chat], "rows")


# How templates write a call: Qwen's, DeepSeek-R1's (only where the content is null), and one with `~`.
CALLS = {
    "qwen2.5": "{{ m.content }}{{ call.arguments | tojson }}",
    "qwen3": "{{ m.content }}{% if call.arguments is string %}{{ call.arguments }}{% else %}"
    "{{ call.arguments | tojson }}{% endif %}",
    "qwen3.5": "{{ m.content }}{% for name, value in call.arguments | items %}<{{ name }}>{{ value }}{% endfor %}",
    "deepseek": "{% if m.content is none %}{{ '```' + call.arguments + '```' }}{% else %}{{ m.content }}{% endif %}",
    "tilde": "{{ m.content }}{{ '```' ~ call.arguments ~ '```' }}",
}
JSON = '{"place": "Zürich", "days": 2}'
WRITTEN = {"qwen3.5": "<place>Zürich<days>2", "deepseek": f"```{JSON}```", "tilde": f"```{JSON}```"}


@pytest.mark.parametrize("form", CALLS)
def test_calls_reach_a_template_in_the_form_that_it_reads(form):
    """OpenAI's files hold arguments as JSON beside a null, and vLLM gives templates a mapping beside an empty text."""
    tokenizer = make_tokenizer("qwen3")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.tool_calls is defined %}{% for one in m.tool_calls %}"
        f"{{% set call = one.function %}}{CALLS[form]}{{% endfor %}}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    for arguments in (JSON, json.loads(JSON)):
        for content in (None, ""):
            call = {"type": "function", "function": {"name": "look", "arguments": arguments}}
            chat = [ASKED, said(content, tool_calls=[call])]
            assert render(tokenizer, [chat], tokenize=False) == ["why" + WRITTEN.get(form, JSON)]
            assert call["function"]["arguments"] is arguments
    # A list without calls is no call: the text of the turn is shown.
    assert render(tokenizer, [[ASKED, said(tool_calls=[])]], tokenize=False) == ["whyso"]

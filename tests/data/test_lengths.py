"""Rows that are too long are refused, left out, or shortened from the beginning, with a message."""

import pytest

from rewarded_lines.data.lengths import Limit, fit, shorten_prompt
from rewarded_lines.errors import UserError


def words(rows):
    return [
        sum(len(turn["content"].split()) for turn in row) if isinstance(row, list) else len(row.split()) for row in rows
    ]


def limit(most, what="the policy"):
    return Limit(what, most, "max_prompt_tokens", words)


ROWS = ["one two three four", "one", "one two three", "one two"]


def test_rows_that_fit_are_left_as_they_are_and_the_longest_is_told():
    told = []
    assert fit(ROWS, [limit(4)], "refuse", "prompts", told.append) == ROWS
    assert told == ["prompts: up to 4 of 4 tokens (max_prompt_tokens) for the policy"]


def test_all_rows_that_are_too_long_are_refused_at_once_for_every_limit():
    with pytest.raises(UserError) as caught:
        fit(ROWS, [limit(2), limit(3, "reward `r`")], "refuse", "prompts")
    first, second = caught.value.problems
    assert first.what == "2 of 4 rows are too long for the policy" and "rows 0, 2" in first.got
    assert first.expected == "at most 2 tokens (max_prompt_tokens)" and "up to 4 tokens" in first.got
    assert second.what == "1 of 4 rows are too long for reward `r`" and "'one two three four'" in second.got
    assert "too_long: leave_out" in first.remedy


@pytest.mark.parametrize(
    ("too_long", "rows", "said"),
    [
        ("leave_out", ["one", "one two"], "2 of 4 rows are too long and left out: 0, 2"),
        (
            "truncate",
            ["three four", "one", "two three", "one two"],
            "2 of 4 rows are too long; their prompts are short",
        ),
    ],
)
def test_rows_are_left_out_or_shortened_as_declared_and_counted(too_long, rows, said):
    told = []
    assert fit(ROWS, [limit(2)], too_long, "prompts", told.append) == rows
    assert told[-1].startswith(f"prompts: {said}")


@pytest.mark.parametrize("too_long", ["leave_out", "truncate"])
def test_nothing_left_is_a_fault(too_long):
    with pytest.raises(UserError, match="1 of 1 rows are too long"):
        fit(["one two"], [Limit("it", 1, "its end", lambda rows: [2] * len(rows))], too_long, "prompts")
    with pytest.raises(UserError, match="no prompt fits beside the longest response"):
        fit(["one two"], [limit(-1)], too_long, "prompts")


def turn(role, content):
    return {"role": role, "content": content}


SYSTEM, FIRST, SAID, LAST = (
    turn("system", "be brief"),
    turn("user", "a b c"),
    turn("assistant", "d"),
    turn("user", "e f g"),
)


@pytest.mark.parametrize(
    ("most", "kept"),
    [
        (9, [SYSTEM, FIRST, SAID, LAST]),
        (8, [SYSTEM, LAST]),
        (5, [SYSTEM, LAST]),
        (4, [SYSTEM, turn("user", "f g")]),
        (3, [SYSTEM, turn("user", "g")]),
        (2, None),
    ],
)
def test_a_chat_keeps_its_system_turn_and_its_last_words(most, kept):
    chat = [SYSTEM, FIRST, SAID, LAST]
    assert shorten_prompt(chat, lambda prompt: words([prompt])[0] <= most) == kept
    assert chat == [SYSTEM, FIRST, SAID, LAST]


def test_a_chat_that_ends_with_a_tools_turn_is_not_cut_within_it():
    chat = [FIRST, SAID, turn("tool", "x y z")]
    assert shorten_prompt(chat, lambda prompt: words([prompt])[0] <= 3) is None


def test_a_chat_of_a_system_turn_alone_cannot_be_shortened():
    assert shorten_prompt([SYSTEM], lambda prompt: False) is None


@pytest.mark.parametrize(
    ("text", "most", "kept"), [("a b  c\nd", 2, "c\nd"), ("a b", 0, None), ("", 0, None), ("a", 1, "a")]
)
def test_a_text_keeps_its_last_words(text, most, kept):
    assert shorten_prompt(text, lambda prompt: words([prompt])[0] <= most) == kept

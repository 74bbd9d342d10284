"""Published forms are read, or refused with one line that reads them; the line is taken from the message."""

import json
import re

import pytest
from documents import ROOT

from rewarded_lines.config import DataSpec
from rewarded_lines.data.dataset_formats import read_demonstrations, read_pairs, read_prompts
from rewarded_lines.data.published_rows import _FORMS
from rewarded_lines.errors import UserError
from rewarded_lines.training.recipe_options import DataOptions

ASKED, SAID = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}
PKU = {
    "prompt": "Why?", "response_0": "So.", "response_1": "No.", "better_response_id": 0, "safer_response_id": 1,
    "is_response_0_safe": False,
}  # fmt: skip
STEER = {"context": [ASKED, SAID, ASKED], "response1": "So.", "response2": "No.", "overall_preference": -2}
STEER_2 = {"prompt": "Why?", "response_1": "So.", "response_2": "No."}
NECTAR = {
    "prompt": "\n\nHuman: Why?\n\nAssistant: ", "turns": 1,
    "answers": [{"answer": text, "model": "m", "rank": rank} for text, rank in [("Mm.", 2), ("No.", 3), ("So.", 1)]],
}  # fmt: skip
ULTRA = {
    "instruction": "Why?",
    "completions": [
        {"response": text, "fine-grained_score": score}
        for text, score in [("Mm.", 3.0), ("So.", 4.25), ("No.", 1.5), ("?", None), ("!", float("nan"))]
    ],
}
ARENA = {
    "conversation_a": [{"role": "user", "content": [{"type": "text", "text": "Why?", "image": None}]}, SAID],
    "conversation_b": [ASKED, {"role": "assistant", "content": "No."}], "winner": "model_a",
}  # fmt: skip
VOTES = {
    "prompt": '["Why?", "And?"]', "response_a": '["So.", "Yes."]', "response_b": '["No.", "No."]',
    "winner_model_a": "0", "winner_model_b": "1", "winner_tie": "0",
}  # fmt: skip
ALPACA = {"instruction": "Why?", "input": "Now?", "output": "So.", "system": ""}


def prompts_of(rows):
    return [row["prompt"] for row in rows]


def pair(prompt="Why?", chosen="So.", rejected="No."):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def turns(*texts):
    return [{"role": "user" if at % 2 == 0 else "assistant", "content": text} for at, text in enumerate(texts)]


def said(text):
    return [{"role": "assistant", "content": text}]


def spec_of(folder, *rows, **more):
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataSpec(file=str(folder / "a.jsonl"), **more)


def remedies(read, spec):
    """Return the lines of a project that a refusal names."""
    with pytest.raises(UserError) as caught:
        read(spec)
    lines = re.findall(r"`(rows|columns): ([^`]+)`", caught.value.problems[0].remedy)
    return [{key: value if key == "rows" else dict([value.strip("{}").split(": ")])} for key, value in lines]


@pytest.mark.parametrize(
    ("row", "pairs"),
    [
        (PKU, [pair(), pair(chosen="No.", rejected="So.")]),
        (STEER, [pair(turns("Why?", "So.", "Why?"), said("So."), said("No."))]),
        (STEER | {"overall_preference": 1}, [pair(turns("Why?", "So.", "Why?"), said("No."), said("So."))]),
        ({key: PKU[key] for key in PKU if not key.startswith("safer")}, [pair()]),
        (STEER_2 | {"preference_strength": -1}, [pair()]),
        (STEER_2 | {"preference_strength": 2}, [pair(chosen="No.", rejected="So.")]),
        (NECTAR, [pair(NECTAR["prompt"])]),
        (ARENA, [pair([ASKED], [SAID], said("No."))]),
        (VOTES, [pair([ASKED], turns("Why?", "No.", "And?", "No.")[1:], turns("Why?", "So.", "And?", "Yes.")[1:])]),
        (ULTRA, [pair()]),
        ({"instruction": "Why?", "input": "Now?", "chosen": "The one.", "rejected": "The other."},
         [pair("Why?\nNow?", "The one.", "The other.")]),
        (ALPACA | {"output": ["So.", "No."], "history": [["Who?", "I."]]},
         [pair(turns("Who?", "I.", "Why?\nNow?"), said("So."), said("No."))]),
        ({"question": "Why?", "chosen": "The one.", "rejected": "The other."},
         [pair("Why?", "The one.", "The other.")]),
    ],
    ids=["pku", "helpsteer3", "helpsteer3, the second", "pku, one preference", "helpsteer2", "helpsteer2, the second",
         "nectar", "arena", "votes", "ultrafeedback", "alpaca", "old alpaca", "question"],
)  # fmt: skip
def test_the_line_of_a_refusal_reads_the_pairs(tmp_path, row, pairs):
    lines = remedies(read_pairs, spec_of(tmp_path, row))
    made = [read_pairs(spec_of(tmp_path, row, **line)) for line in lines if "rows" in line or "question" in row]
    assert made == [[one] for one in pairs]
    functions = [line["rows"] for line in lines if "rows" in line]
    assert len(functions) == len(pairs) or "question" in row
    for function, wanted in zip(functions, pairs[: len(functions)], strict=True):
        options = DataOptions(train_file=str(tmp_path / "a.jsonl"), row_function=function)
        assert read_pairs(options.train()) == [wanted]
        assert prompts_of(read_prompts(options.train())) == [wanted["prompt"]]


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        (STEER, STEER["context"]),
        (ULTRA, "Why?"),
        ({"problem": "Why?"}, "Why?"),
        ({"talk": turns("Why?", "So.")}, turns("Why?")),
        (PKU, "Why?"),
        (NECTAR, NECTAR["prompt"]),
    ],
)
def test_prompts_are_read_or_refused_with_the_column_that_holds_them(tmp_path, row, prompt):
    if "prompt" in row:
        assert prompts_of(read_prompts(spec_of(tmp_path, row))) == [prompt]
        return
    columns = next(line for line in remedies(read_prompts, spec_of(tmp_path, row)) if "columns" in line)
    assert prompts_of(read_prompts(spec_of(tmp_path, row, **columns))) == [prompt]


def test_nectars_prompt_is_a_chat_where_the_data_are_chats(tmp_path):
    spec = spec_of(tmp_path, NECTAR, rows="rewarded_lines.data.published_rows:nectar", chat=True)
    assert read_pairs(spec) == [pair(turns("Why?"), said("So."), said("No."))]


def test_prompts_that_are_lists_in_json_are_refused(tmp_path):
    for more in ({}, {"chat": True}):
        with pytest.raises(UserError, match="(?s)lists of texts in JSON.*published_rows:arena"):
            read_prompts(spec_of(tmp_path, VOTES, VOTES, **more))
    # One among others is a prompt as it is.
    assert prompts_of(read_prompts(spec_of(tmp_path, {"prompt": '["a"]'}, {"prompt": "[b"}))) == ['["a"]', "[b"]


def test_a_system_turn_under_another_name_is_told(tmp_path):
    row, told = {"messages": [ASKED, SAID], "system_prompt": "Be brief."}, []
    assert read_demonstrations(spec_of(tmp_path, row), tell=told.append) == [{"messages": [ASKED, SAID]}]
    (line,) = re.findall(r"`columns: {([^`]+)}`", told[0])
    columns = dict([line.split(": ")])
    wanted = [{"role": "system", "content": "Be brief."}, ASKED, SAID]
    assert read_demonstrations(spec_of(tmp_path, row, columns=columns), tell=told.append) == [{"messages": wanted}]
    assert "system_prompt" in told[0] and not any("system_prompt" in one for one in told[1:])


def test_alpacas_rows_are_demonstrations(tmp_path):
    (line,) = remedies(read_demonstrations, spec_of(tmp_path, ALPACA))
    rows, told = [ALPACA, ALPACA | {"input": ""}], []
    made = [{"prompt": prompt, "completion": "So."} for prompt in ("Why?\nNow?", "Why?")]
    assert read_demonstrations(spec_of(tmp_path, *rows, **line), tell=told.append) == made
    assert not any("empty" in one for one in told)
    # Alpaca itself has such rows.
    read_demonstrations(spec_of(tmp_path, *rows, ALPACA | {"output": ""}, **line), tell=told.append)
    assert "1 of 3 answers are empty" in told[-1]


@pytest.mark.parametrize(
    ("function", "tie"),
    [
        ("helpsteer3", STEER | {"overall_preference": 0}),
        ("helpsteer2", STEER_2 | {"preference_strength": 0}),
        ("nectar", NECTAR | {"answers": [{"answer": "So.", "rank": 1}, {"answer": "No.", "rank": 1}]}),
        ("ultrafeedback", ULTRA | {"completions": ULTRA["completions"][3:]}),
        ("arena", ARENA | {"winner": "tie (bothbad)"}),
        ("arena", VOTES | {"winner_model_b": "0", "winner_tie": "1"}),
        ("arena", VOTES | {"response_a": '["So.", null]'}),
    ],
)
def test_ties_are_left_out(tmp_path, function, tie):
    with pytest.raises(UserError, match="there are no rows"):
        read_pairs(spec_of(tmp_path, tie, rows=f"rewarded_lines.data.published_rows:{function}"))


def test_the_page_names_every_function():
    functions = {name for _, names, _ in _FORMS for name in names}
    page = (ROOT / "recipes" / "README.md").read_text()
    assert functions == {name for name in functions if f"| `{name}`" in page or f", `{name}`" in page}


def test_an_answer_that_is_not_there_is_refused(tmp_path):
    spec = spec_of(tmp_path, PKU | {"safer_response_id": -1}, rows="rewarded_lines.data.published_rows:pku_safer")
    with pytest.raises(UserError, match="the better answer is 0 or 1, not -1"):
        read_pairs(spec)


SHARED = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]
PARTS = [{"type": "text", "text": "Wh"}, {"type": "text", "text": "y?"}]


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"conversations": SHARED, "system": "Be brief."}, [{"role": "system", "content": "Be brief."}, ASKED, SAID]),
        ({"conversations": [{"from": "system", "value": "Be brief."}, *SHARED]},
         [{"role": "system", "content": "Be brief."}, ASKED, SAID]),
        ({"conversations": [{"from": "user", "value": "Why?"}, {"from": "assistant", "value": "So."}]}, [ASKED, SAID]),
        ({"conversations": [{"role": "human", "content": "Why?"}, {"role": "gpt", "content": "So."}]}, [ASKED, SAID]),
        ({"messages": [{"role": "user", "content": PARTS}, SAID]}, [ASKED, SAID]),
        ({"conversations": [
            SHARED[0], {"from": "function_call", "value": '{"name": "look", "arguments": {"at": "x"}}'},
            {"from": "observation", "value": "y"}, SHARED[1],
         ]},
         [ASKED, {"role": "assistant", "content": "", "tool_calls": [
            {"type": "function", "function": {"name": "look", "arguments": {"at": "x"}}}
         ]}, {"role": "tool", "content": "y"}, SAID]),
    ],
    ids=["system's column", "system's turn", "other speakers", "other roles", "parts", "calls"],
)  # fmt: skip
def test_chats_of_sharegpt_and_of_parts_are_demonstrations_and_prompts(tmp_path, row, messages):
    assert read_demonstrations(spec_of(tmp_path, row)) == [{"messages": messages}]
    assert prompts_of(read_prompts(spec_of(tmp_path, row))) == [messages[:-1]]


def test_pairs_of_sharegpt_and_of_parts_are_read(tmp_path):
    rows = [
        {"conversations": SHARED[:1], "chosen": SHARED[1], "rejected": {"from": "gpt", "value": "No."}},
        {"conversations": SHARED[:1], "chosen": SHARED[1:], "rejected": [{"from": "gpt", "value": "No."}]},
        {"conversations": [{"role": "user", "content": PARTS}], "chosen": [SAID], "rejected": said("No.")},
    ]
    assert read_pairs(spec_of(tmp_path, *rows)) == [pair([ASKED], [SAID], said("No."))] * 3


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "a"}]}, SAID]}, "`image_url`"),
        ({"messages": [{"role": "user", "content": "<image>Why?"}, SAID], "images": ["a.png"]}, "a row has images"),
        ({"conversations": [SHARED[0], {"from": "function_call", "value": "look(x)"}]}, "not a function call"),
    ],
)
def test_images_and_broken_calls_are_refused(tmp_path, row, what):
    with pytest.raises(UserError, match=what):
        read_prompts(spec_of(tmp_path, row))

"""Every published form of preference data becomes a prompt and two answers."""

import csv
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from trl.data_utils import maybe_extract_prompt

from rewarded_lines.config import DataSpec
from rewarded_lines.data.dataset_formats import read_demonstrations, read_pairs, read_prompts
from rewarded_lines.errors import UserError


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


ASKED, SAID, OTHER = turn("user", "Why is it blue?"), turn("assistant", "Light."), turn("assistant", "No idea.")
SYSTEM = turn("system", "Be brief.")
BEFORE = [turn("user", "Hello"), turn("assistant", "Hi")]
SIDES = {"chosen": SAID, "rejected": OTHER}
HUMAN = "\n\nHuman: Why is it blue?\n\nAssistant:"
PAIR = {"prompt": [ASKED], "chosen": [SAID], "rejected": [OTHER]}
LONG = {"prompt": [SYSTEM, *BEFORE, ASKED], "chosen": [SAID], "rejected": [OTHER]}
FORMS = {
    "explicit turns": (PAIR, PAIR),
    "ultrafeedback: a text, and whole chats that begin with it": (
        {"prompt": "Why is it blue?", "chosen": [ASKED, SAID], "rejected": [ASKED, OTHER]},
        PAIR,
    ),
    "a text that is one of several turns, after a system turn": (
        {"prompt": " Why is it blue? "} | {side: [SYSTEM, *BEFORE, ASKED, one] for side, one in SIDES.items()},
        LONG,
    ),
    "a text and the answers' turns": ({"prompt": "Why is it blue?", "chosen": [SAID], "rejected": [OTHER]}, PAIR),
    "turns and the answers' texts": ({"prompt": [ASKED], "chosen": "Light.", "rejected": "No idea."}, PAIR),
    "an answer as one message": ({"prompt": "Why is it blue?", "chosen": SAID, "rejected": OTHER}, PAIR),
    "implicit, one turn": ({"chosen": [ASKED, SAID], "rejected": [ASKED, OTHER]}, PAIR),
    "implicit, several turns and a system's": (
        {"chosen": [SYSTEM, *BEFORE, ASKED, SAID], "rejected": [SYSTEM, *BEFORE, ASKED, OTHER]},
        LONG,
    ),
    "whole chats beside a prompt of turns": ({**PAIR, "chosen": [ASKED, SAID], "rejected": [ASKED, OTHER]}, PAIR),
    "the same answer twice": (
        {"chosen": [ASKED, SAID], "rejected": [ASKED, SAID]},
        {**PAIR, "rejected": [SAID]},
    ),
    "one side goes on": (
        {"chosen": [ASKED, SAID], "rejected": [ASKED, SAID, *BEFORE]},
        {**PAIR, "rejected": [SAID, *BEFORE]},
    ),
    "whole chats after a system turn, beside a prompt without it": (
        {"prompt": [turn("user", "Why is it blue? ")]} | {side: [SYSTEM, ASKED, one] for side, one in SIDES.items()},
        {**PAIR, "prompt": [SYSTEM, ASKED]},
    ),
    "a prompt of turns that differ by facts about them": (
        {"prompt": [ASKED | {"id": 1}]} | {side: [ASKED | {"id": 2}, one] for side, one in SIDES.items()},
        {**PAIR, "prompt": [ASKED | {"id": 1}]},
    ),
    "chats whose turns differ by facts about them": (
        {"chosen": [ASKED | {"id": 1}, SAID], "rejected": [ASKED | {"id": 2}, OTHER]},
        {**PAIR, "prompt": [ASKED | {"id": 1}]},
    ),
    "sharegpt: the prompt as a conversation": (
        {"conversations": [{"from": "human", "value": "Why is it blue?"}]}
        | {side: {"from": "gpt", "value": one["content"]} for side, one in SIDES.items()},
        PAIR,
    ),
    "nothing in the prompt's column": ({"prompt": None, "chosen": [ASKED, SAID], "rejected": [ASKED, OTHER]}, PAIR),
    "an empty text in the prompt's column": ({"prompt": "", "chosen": [ASKED, SAID], "rejected": [ASKED, OTHER]}, PAIR),
    "the prompt as messages": ({"messages": [ASKED], "chosen": [SAID], "rejected": [OTHER]}, PAIR),
    "whole chats, and the first once more as messages": (
        {"messages": [ASKED, SAID], "chosen": [ASKED, SAID], "rejected": [ASKED, OTHER]},
        PAIR,
    ),
    "texts that repeat their prompt": (
        {"prompt": "Why?", "chosen": "Why? So.", "rejected": "Why? No."},
        {"prompt": "Why?", "chosen": " So.", "rejected": " No."},
    ),
    "hh-rlhf beside its prompt": (
        {"prompt": HUMAN.removesuffix("\n\nAssistant:"), "chosen": f"{HUMAN} Light.", "rejected": f"{HUMAN} Love."},
        {"prompt": HUMAN, "chosen": " Light.", "rejected": " Love."},
    ),
    "texts": ({"prompt": "Why?", "chosen": " So.", "rejected": " No."},) * 2,
    "hh-rlhf": (
        {"chosen": f"{HUMAN} Light.", "rejected": f"{HUMAN} Love."},
        {"prompt": HUMAN, "chosen": " Light.", "rejected": " Love."},
    ),
    "implicit texts, at a word's border": (
        {"chosen": "It is water", "rejected": "It is wax"},
        {"prompt": "It is", "chosen": " water", "rejected": " wax"},
    ),
}  # fmt: skip


def prompts_of(spec, **options):
    return [row["prompt"] for row in read_prompts(spec, **options)]


def save(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataSpec(file=str(path))


@pytest.mark.parametrize("name", FORMS)
def test_every_published_form_is_one_prompt_and_two_answers(tmp_path, name):
    row, made = FORMS[name]
    told = []
    assert read_pairs(save(tmp_path / "a.jsonl", row), tell=told.append) == [made]
    assert prompts_of(save(tmp_path / "a.jsonl", row)) == [made["prompt"]]
    sentence, *ties = told
    assert bool(ties) == (name == "the same answer twice")
    kind = "chats" if isinstance(made["prompt"], list) else "texts"
    assert sentence.startswith(f"rows of {tmp_path / 'a.jsonl'}: {kind}")
    nothing = not row.get("prompt", row.get("conversations")) and name != "the prompt as messages"
    assert ("prompt taken" in sentence) == (nothing or "whole chats that" in name or "one of several" in name)


@pytest.mark.parametrize("name", ["implicit, one turn", "implicit, several turns and a system's", "explicit turns"])
def test_where_trl_reads_a_chat_right_it_is_read_alike(tmp_path, name):
    row, _ = FORMS[name]
    assert read_pairs(save(tmp_path / "a.jsonl", row)) == [maybe_extract_prompt(row)]


def test_arrow_fills_gaps_with_nulls_that_are_no_part_of_a_message(tmp_path):
    rows = [PAIR, {**PAIR, "prompt": [turn("user", "Who?", name="ann")]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert read_pairs(DataSpec(file=str(tmp_path / "a.parquet"))) == rows


@pytest.mark.parametrize(
    ("text", "turns"),
    [
        ("Why?", [turn("user", "Why?")]),
        ("\n\nHuman: Why?\n\nAssistant:", [turn("user", "Why?")]),
        (
            "\n\nHuman: Hello\nthere\n\nAssistant: Hi.\n\nHuman: Why?\n\nAssistant:",
            [turn("user", "Hello\nthere"), turn("assistant", "Hi."), turn("user", "Why?")],
        ),
    ],
)
def test_texts_become_turns_where_the_data_are_chats(tmp_path, text, turns):
    spec = save(tmp_path / "a.jsonl", {"prompt": text})
    assert prompts_of(spec) == [text]
    assert prompts_of(spec.model_copy(update={"chat": True})) == [turns]
    with_system = spec.model_copy(update={"chat": True, "system": "Be brief."})
    assert prompts_of(with_system) == [[SYSTEM, *turns]]


def test_hh_rlhf_as_chats_has_the_answers_without_their_spaces(tmp_path):
    row = FORMS["hh-rlhf"][0]
    (pair,) = read_pairs(save(tmp_path / "a.jsonl", row).model_copy(update={"chat": True}))
    assert pair == {"prompt": [ASKED], "chosen": [SAID], "rejected": [turn("assistant", "Love.")]}


def test_a_system_column_is_the_first_turn_of_a_chat(tmp_path):
    row = {"system": "Be brief.", "question": "Why is it blue?", "chosen": "Light.", "rejected": "No idea."}
    spec = save(tmp_path / "a.jsonl", row).model_copy(update={"columns": {"prompt": "question"}})
    assert read_pairs(spec)[0]["prompt"] == "Why is it blue?"
    assert read_pairs(spec.model_copy(update={"chat": True})) == [{**PAIR, "prompt": [SYSTEM, ASKED]}]
    own = {**PAIR, "prompt": [turn("system", "Shout."), ASKED], "system": "Be brief."}
    assert prompts_of(save(tmp_path / "b.jsonl", own)) == [own["prompt"]]


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"messages": [SYSTEM, ASKED, SAID]}, [SYSTEM, ASKED]),
        ({"messages": [ASKED]}, [ASKED]),
        ({"prompt": "Why is it blue?", "messages": [*BEFORE, ASKED, SAID]}, [*BEFORE, ASKED]),
        ({"prompt": "Another.", "messages": [ASKED, SAID]}, "Another."),
        ({"prompt": "Why?", "completion": " So."}, "Why?"),
        (
            {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]},
            [turn("user", "Why?")],
        ),
    ],
)
def test_prompts_are_what_is_answered_in_whole_chats_and_demonstrations(tmp_path, row, prompt):
    assert prompts_of(save(tmp_path / "a.jsonl", row)) == [prompt]


@pytest.mark.parametrize(
    ("row", "made"),
    [
        ({"messages": [ASKED, SAID]}, None),
        ({"conversations": [{"from": "gpt", "value": "Light."}]}, {"messages": [SAID]}),
        ({"prompt": "Why?", "completion": [SAID]}, {"prompt": [turn("user", "Why?")], "completion": [SAID]}),
        ({"prompt": [ASKED], "completion": "Light."}, {"prompt": [ASKED], "completion": [SAID]}),
        ({"prompt": "Why?", "completion": " So."}, None),
        ({"text": "All of it."}, None),
        ({"messages": [ASKED, SAID], "tools": [{"name": "look"}]}, None),
    ],
)
def test_demonstrations_are_messages_prompts_with_completions_or_texts(tmp_path, row, made):
    assert read_demonstrations(save(tmp_path / "a.jsonl", row)) == [made or row]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"chosen": "warm film", "rejected": "dull film"}], "begin differently"),
        ([{"chosen": "the same", "rejected": "the same"}], "are the same"),
        ([{"chosen": [ASKED, SAID], "rejected": [*BEFORE]}], "begin differently"),
        ([{"prompt": "How?", "chosen": [ASKED, SAID], "rejected": [ASKED, OTHER]}], "not among the turns"),
        ([PAIR, {**PAIR, "prompt": "Why?", "chosen": "a", "rejected": "b"}], "some rows are chats, others texts"),
        ([{**PAIR, "prompt": [ASKED, SAID]}], "ends without a question"),
        ([{**PAIR, "prompt": [SYSTEM]}], "ends without a question"),
        ([{**PAIR, "tools": [{"name": "look"}]}], "only SFT"),
        ([{**PAIR, "chosen": [ASKED]}], "not the assistant's"),
        ([{**PAIR, "chosen": [SAID, ASKED]}], "not the assistant's"),
        ([{**PAIR, "chat_template_kwargs": {"enable_thinking": False}}], "belong to the project"),
    ],
)
def test_what_is_no_pair_is_refused_with_its_row(tmp_path, rows, said):
    with pytest.raises(UserError, match=said) as caught:
        read_pairs(save(tmp_path / "a.jsonl", *rows))
    (problem,) = caught.value.problems
    assert problem.where.startswith(f"{tmp_path / 'a.jsonl'}, row {len(rows) - 1}")


def test_pairs_of_one_answer_are_counted(tmp_path):
    told, tie = [], {"prompt": "Why?", "chosen": "So.", "rejected": "So."}
    read_pairs(save(tmp_path / "a.jsonl", tie, tie | {"chosen": "Mm."}), tell=told.append)
    assert "1 of 2 pairs have the same answer twice" in told[1]


def test_a_system_column_that_texts_do_not_read_is_told(tmp_path):
    told = []
    read_prompts(save(tmp_path / "a.jsonl", {"prompt": "Why?", "system": "Be brief."}), tell=told.append)
    assert "1 have a system turn in a column, which texts do not" in told[0]


def test_arrow_fills_the_arguments_of_calls_with_nulls_that_nobody_wrote(tmp_path):
    calls = [{"function": {"name": "look", "arguments": given}} for given in ({"place": "rome"}, {"night": True})]
    rows = [{"messages": [ASKED, turn("assistant", "", tool_calls=[call])], "tools": [call]} for call in calls]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert read_demonstrations(DataSpec(file=str(tmp_path / "a.parquet"))) == rows


def test_tools_may_be_json(tmp_path):
    row = {"messages": [ASKED, SAID]}
    assert read_demonstrations(save(tmp_path / "a.jsonl", {**row, "tools": "[]"})) == [row]
    assert prompts_of(save(tmp_path / "a.jsonl", {**row, "tools": "[]"})) == [[ASKED]]
    with pytest.raises(UserError, match="`tools` is not JSON"):
        read_demonstrations(save(tmp_path / "a.jsonl", {**row, "tools": "look"}))


def test_an_empty_answer_is_an_answer(tmp_path):
    row = {"chosen": f"{HUMAN} Light.", "rejected": HUMAN}
    (pair,) = read_pairs(save(tmp_path / "a.jsonl", row).model_copy(update={"chat": True}))
    assert pair == {"prompt": [ASKED], "chosen": [SAID], "rejected": [turn("assistant", "")]}


def test_other_columns_may_have_the_names_of_answers(tmp_path):
    assert prompts_of(save(tmp_path / "a.jsonl", {"prompt": "Why?", "chosen": 0, "rejected": 1})) == ["Why?"]


@pytest.mark.parametrize(
    ("row", "settings", "said"),
    [
        ({"messages": "Why?"}, {}, "a text in a column of messages"),
        ({"text": "Why? So."}, {"chat": True}, "a whole text has no turns"),
        ({"messages": [ASKED]}, {}, "without an answer"),
        ({"prompt": "Why?", "completion": "No.", "label": False}, {}, "marked as a bad one"),
        ({"messages": [ASKED, {**SAID, "weight": 0}, ASKED, SAID]}, {}, "(?s)not to be trained on.*`completion`"),
        ({"conversations": [{"from": "gpt", "value": "So.", "train": False}]}, {}, "not to be trained on"),
    ],
)
def test_what_is_no_demonstration_is_refused(tmp_path, row, settings, said):
    with pytest.raises(UserError, match=said):
        read_demonstrations(save(tmp_path / "a.jsonl", row).model_copy(update=settings))


def test_what_is_marked_as_good_or_not_trained_on_is_a_demonstration(tmp_path):
    rows = [{"prompt": [ASKED, {**SAID, "weight": 0}, ASKED], "completion": [{**SAID, "weight": 1}], "label": True}]
    assert len(read_demonstrations(save(tmp_path / "a.jsonl", *rows))) == 1
    assert len(read_demonstrations(save(tmp_path / "a.jsonl", {"text": "A film.", "label": False}))) == 1


@pytest.mark.parametrize("write", [json.dumps, str])
def test_chats_that_a_table_holds_as_texts_are_chats(tmp_path, write):
    row = {name: write(value) for name, value in PAIR.items()}
    with (tmp_path / "a.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, row)
        table.writeheader()
        table.writerow(row)
    assert read_pairs(DataSpec(file=str(tmp_path / "a.csv"))) == [PAIR]


def test_lists_that_lost_their_commas_are_refused_and_other_texts_stay(tmp_path):
    printed = "[{'content': 'Why?', 'role': 'user'}\n {'content': 'Light.', 'role': 'assistant'}]"
    with pytest.raises(UserError, match="(?s)looks like the turns.*Parquet or JSON lines"):
        read_prompts(save(tmp_path / "a.jsonl", {"prompt": printed}))
    for text in ('[{"value": 5}]', "[{'content': 5}]", '{"role": "user"}', '[{"role": "user"} is JSON', "[1, 2]"):
        assert prompts_of(save(tmp_path / "a.jsonl", {"prompt": text})) == [text]


def test_settings_of_a_row_of_texts_are_no_chats(tmp_path):
    row = {"prompt": "Why?", "tools": [{"name": "look"}], "system": "Be brief.", "chat_template_kwargs": {"a": 1}}
    assert prompts_of(save(tmp_path / "a.jsonl", row)) == ["Why?"]

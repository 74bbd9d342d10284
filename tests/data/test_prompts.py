"""Prompts as texts and as chats: turns, tokens up to where the answer starts, and the way back to texts."""

import json

import pytest
from tiny_models import make_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rewarded_lines.config import DataSpec
from rewarded_lines.data.prompts import encode, load_prompts, prompt_text, split_text, with_turns
from rewarded_lines.errors import UserError
from rewarded_lines.learning.scratch import ScratchModel, train_tokenizer
from rewarded_lines.projects import load_project

TEMPLATE = """\
{% for turn in messages %}<s>{{ turn.role }}: {{ turn.content }}</s>{% endfor %}\
{% if add_generation_prompt %}<s>assistant:{% endif %}"""


def turn(role, content):
    return {"role": role, "content": content}


SYSTEM, ASKED, SAID = turn("system", "Be brief."), turn("user", "Why?"), turn("assistant", "So.")
CHAT, PLAIN = DataSpec(file="x", chat=True), DataSpec(file="x")
WITH_SYSTEM = DataSpec(file="x", chat=True, system="Be brief.")


@pytest.mark.parametrize(
    ("row", "made", "with_system"),
    [
        ({"prompt": "Why?"}, {"prompt": [ASKED]}, {"prompt": [SYSTEM, ASKED]}),
        ({"prompt": [ASKED]}, {"prompt": [ASKED]}, {"prompt": [SYSTEM, ASKED]}),
        ({"prompt": [turn("system", "Shout."), ASKED]}, None, None),
        (
            {"prompt": "Why?", "chosen": "So.", "rejected": [turn("assistant", "No.")]},
            {"prompt": [ASKED], "chosen": [SAID], "rejected": [turn("assistant", "No.")]},
            {"prompt": [SYSTEM, ASKED], "chosen": [SAID], "rejected": [turn("assistant", "No.")]},
        ),
        ({"completion": "So."}, {"completion": [SAID]}, {"completion": [SAID]}),
        ({"messages": [ASKED, SAID]}, None, {"messages": [SYSTEM, ASKED, SAID]}),
        ({"messages": [SYSTEM, ASKED]}, None, None),
        ({"text": "Why? So."}, None, None),
    ],
    ids=["text", "turns", "own system", "pair", "answer", "messages", "messages with system", "whole text"],
)
def test_texts_become_turns_where_the_data_are_chats(row, made, with_system):
    before = json.dumps(row)
    assert with_turns([row], PLAIN) == [row]
    assert with_turns([row], CHAT) == [row if made is None else made]
    assert with_turns([row], WITH_SYSTEM) == [row if with_system is None else with_system]
    assert json.dumps(row) == before


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        (" A text,\nas it is ", " A text,\nas it is "),
        ([SYSTEM, ASKED], "Why?"),
        ([ASKED, SAID, turn("user", " And? ")], "Why?\n\nSo.\n\n And? "),
    ],
)
def test_a_reward_reads_what_was_said_but_not_the_system(prompt, text):
    assert prompt_text(prompt) == text


def test_texts_are_encoded_as_the_tokenizer_does_it():
    plain, opening = make_tokenizer(), train_tokenizer(["a film"], ScratchModel(vocab_size=300))
    texts = ["a film", "", "dog"]
    for tokenizer, opens in ((plain, 0), (opening, 1)):
        rows = encode(tokenizer, texts)
        assert rows == [tokenizer(text)["input_ids"] for text in texts]
        assert len(rows[1]) == opens and all(row[:1] == [tokenizer.bos_token_id] for row in rows if opens)


def test_chats_are_encoded_in_the_tokenizers_template_up_to_the_answer():
    tokenizer = train_tokenizer(["a film"], ScratchModel(vocab_size=300, lowercase=False))
    tokenizer.chat_template = TEMPLATE
    chats = [[SYSTEM, ASKED], [ASKED, SAID, ASKED], "Why?"]
    written = [
        "<s>system: Be brief.</s><s>user: Why?</s><s>assistant:",
        "<s>user: Why?</s><s>assistant: So.</s><s>user: Why?</s><s>assistant:",
        "<s>user: Why?</s><s>assistant:",
    ]
    ids = tokenizer(written, add_special_tokens=False)["input_ids"]
    assert encode(tokenizer, chats) == ids and encode(tokenizer, chats[:1]) == ids[:1]
    assert tokenizer.decode(ids[0]) == written[0] and encode(tokenizer, []) == []


def test_chats_without_a_template_are_a_fault(tmp_path):
    make_tokenizer().save_pretrained(tmp_path)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    with pytest.raises(UserError) as caught:
        encode(tokenizer, ["a", [ASKED]])
    (problem,) = caught.value.problems
    assert (problem.what, problem.where) == ("the tokenizer has no chat template", str(tmp_path))
    assert "chat_template.jinja" in problem.expected and "`chat: false`" in problem.remedy


@pytest.mark.parametrize("template", ["{{ raise_exception('no system role here') }}", "{% for turn in"])
def test_a_template_that_fails_is_a_fault(template):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(UserError, match="template"):
        encode(tokenizer, [[SYSTEM, ASKED]])


def sentencepiece_like():
    """A tokenizer that writes the space before a word into its token, and drops it where a text begins."""
    words = ["<unk>", "</s>", "▁a", "▁film", "▁moves", "s"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


def test_a_response_keeps_the_space_it_starts_with():
    tokenizer = sentencepiece_like()
    ids = tokenizer("a film moves")["input_ids"]
    assert tokenizer.decode(ids[2:]) == "moves"
    assert split_text(ids, 2, tokenizer) == ("a film", " moves")
    assert split_text([*ids, tokenizer.eos_token_id], 2, tokenizer) == ("a film", " moves")


@pytest.mark.parametrize(
    ("prompt", "response"), [("a film", " of great , beauty ."), ("a film", ""), ("", "dog"), (" a\n", "\n b ")]
)
def test_the_parts_of_a_text_are_what_went_into_it(prompt, response):
    tokenizer = make_tokenizer()
    head, tail = tokenizer([prompt, response])["input_ids"]
    ids = [tokenizer.pad_token_id, tokenizer.bos_token_id, *head, *tail, tokenizer.eos_token_id]
    assert split_text(ids, len(head) + 2, tokenizer) == (prompt, response)


def test_a_character_across_the_border_does_not_break_the_split():
    tokenizer = make_tokenizer()
    ids = tokenizer("a é b")["input_ids"]
    border = next(
        index for index in range(len(ids)) if tokenizer.decode(ids[:index]).endswith("\N{REPLACEMENT CHARACTER}")
    )
    assert split_text(ids, border, tokenizer) == (tokenizer.decode(ids[:border]), tokenizer.decode(ids[border:]))
    assert split_text(ids, border, tokenizer)[1].endswith(" b")


def project(folder, prompts):
    (folder / "suite").mkdir()
    rows = [{"info": {"post": text}, "id": index} for index, text in enumerate(("One?", "Two?", "Three?"))]
    (folder / "suite/data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "suite/rewarded-lines.yaml").write_text(f"base: sft\n{prompts}")
    return load_project(folder / "suite/rewarded-lines.yaml")


def test_a_projects_prompts_are_the_first_of_its_data_as_declared(tmp_path):
    declared = "prompts:\n  file: data.jsonl\n  columns: {prompt: info.post}\n  limit: 2\n"
    assert load_prompts(project(tmp_path, declared)) == ["One?", "Two?"]
    path = tmp_path / "suite/rewarded-lines.yaml"
    path.write_text(path.read_text() + "  chat: true\n  system: Be brief.\n")
    assert load_prompts(load_project(path)) == [[SYSTEM, turn("user", text)] for text in ("One?", "Two?")]


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        ("", "`prompts` is missing"),
        ("prompts: {file: data.jsonl}", "columns prompt"),
        ("prompts: {file: none.jsonl}", "no such file"),
    ],
)
def test_a_project_without_prompts_is_a_fault(tmp_path, prompts, said):
    with pytest.raises(UserError, match=said):
        load_prompts(project(tmp_path, prompts))

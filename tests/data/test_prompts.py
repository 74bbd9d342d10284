"""Prompts become tokens up to where the answer starts, and tokens become texts again."""

import json

import pytest
from chat_forms import FORMS, ends, turn_end
from chat_forms import make_tokenizer as forms_tokenizer
from tiny_models import make_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from rewarded_lines.data.chat_templates import with_settings
from rewarded_lines.data.dataset_formats import read_prompts
from rewarded_lines.data.prompts import encode, encode_answers, prompt_key, prompt_text, split_text
from rewarded_lines.errors import UserError
from rewarded_lines.projects import load_project
from rewarded_lines.training.scratch_model import ScratchModel, train_tokenizer

TEMPLATE = """\
{% for turn in messages %}<s>{{ turn.role }}: {{ turn.content }}</s>{% endfor %}\
{% if add_generation_prompt %}<s>assistant:{% endif %}"""


def turn(role, content):
    return {"role": role, "content": content}


SYSTEM, ASKED, SAID = turn("system", "Be brief."), turn("user", "Why?"), turn("assistant", "So.")


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


@pytest.mark.parametrize("form", FORMS)
def test_a_text_that_begins_with_bos_gets_no_second_one(form):
    tokenizer = forms_tokenizer(form)
    rendered = tokenizer.apply_chat_template([ASKED], add_generation_prompt=True, tokenize=False)
    opened = [text for text in (rendered, f"{tokenizer.bos_token}why") if tokenizer.bos_token]
    for text in opened:
        (ids,) = encode(tokenizer, [text])
        assert ids.count(tokenizer.bos_token_id) == 1
        # The text has all special tokens, so the tokenizer must add none.
        own = tokenizer(text, add_special_tokens=not text.startswith(tokenizer.bos_token))["input_ids"]
        assert ids == own
    if form in ("llama3", "gemma3", "mistral"):
        assert encode(tokenizer, [rendered]) == encode(tokenizer, [[ASKED]])


@pytest.mark.parametrize("form", FORMS)
def test_an_answer_in_training_follows_its_prompt_and_ends_with_the_turn(form):
    tokenizer = forms_tokenizer(form)
    settings = {"enable_thinking": False} if form == "qwen3" else {}
    tokenizer.chat_template = with_settings(tokenizer.chat_template, settings)
    (head,), (tail,) = encode_answers(
        tokenizer, [[ASKED]], [[SAID]], tokenizer.convert_tokens_to_ids([*ends(form), turn_end(form)])
    )
    assert [head] == encode(tokenizer, [[ASKED]])
    whole = tokenizer.apply_chat_template([ASKED, SAID], tokenize=True, return_dict=True)["input_ids"]
    assert head + tail == whole[: len(head) + len(tail)] and tail[-1] in tokenizer.convert_tokens_to_ids(ends(form))
    assert tokenizer.decode(tail, skip_special_tokens=True).strip() == "So."
    left = set(tokenizer.decode(whole[len(head) + len(tail) :]).strip())
    assert not left or form == "phi"


def test_a_template_that_renders_the_prompt_otherwise_before_an_answer_is_refused():
    tokenizer = forms_tokenizer("phi")
    tokenizer.chat_template = "{{ messages | length }}{{ messages[0].content }}"
    with pytest.raises(UserError, match="renders a prompt differently"):
        encode_answers(tokenizer, [[ASKED]], [[SAID]], ())


def test_an_answer_that_is_a_text_follows_the_prompts_own_tokens():
    tokenizer = make_tokenizer()
    end = tokenizer.eos_token_id
    for prompt, answer in (("the quick", " brown fox"), ("the quick", " fox</s>"), ("the qui", "ck fox"), ("", "dog")):
        (head,), (tail,) = encode_answers(tokenizer, [prompt], [answer], ())
        assert [head] == encode(tokenizer, [prompt]) and tail[-1] == end and tail.count(end) == 1
        assert tokenizer.decode(head + tail, skip_special_tokens=True) == prompt + answer.removesuffix("</s>")


def test_no_end_stands_behind_a_prompt_where_a_tokenizer_puts_one_behind_every_text():
    tokenizer = make_tokenizer()
    plain = tokenizer("the quick")["input_ids"]
    end = (tokenizer.eos_token, tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(f"$A {end[0]}", special_tokens=[end])
    assert tokenizer("the quick")["input_ids"][-1] == end[1]
    assert encode(tokenizer, ["the quick"]) == [plain]
    assert encode(tokenizer, [f"the quick{end[0]}"])[0][-1] == end[1]


def test_an_answer_that_ends_already_gets_no_second_end():
    tokenizer = forms_tokenizer("gemma3")
    turn_ends = tokenizer.convert_tokens_to_ids(ends("gemma3"))
    _, (tail,) = encode_answers(tokenizer, ["why"], [" so<end_of_turn>"], turn_ends)
    assert tokenizer.decode(tail) == " so<end_of_turn>"
    _, (tail,) = encode_answers(tokenizer, ["why"], [" so"], turn_ends)
    assert tokenizer.decode(tail) == " so<eos>"


def test_chats_are_known_by_their_turns_and_texts_by_themselves():
    keys = [prompt_key(prompt) for prompt in ("Why?", [ASKED], [SYSTEM, ASKED], [{**ASKED, "name": "ann"}])]
    assert keys[0] == "Why?" and len(set(keys)) == 4


def load_prompts(project):
    project.require("prompts")
    return [row["prompt"] for row in read_prompts(project.config.prompts, project.root)]


def sentencepiece_like():
    """A tokenizer whose tokens hold the space before a word; it drops the space at the start of a text."""
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

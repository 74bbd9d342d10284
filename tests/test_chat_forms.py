"""The tiny chat models of chat_forms.py have the form of the published ones and respond in it."""

from __future__ import annotations

import pytest
import torch
from chat_forms import FORMS, ends, make_chat, make_classifier, make_tokenizer, turn_end
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

SYSTEM = {"role": "system", "content": "be brief"}
USER = {"role": "user", "content": "is rome good"}
ANSWER = {"role": "assistant", "content": "yes"}
RENDERED = {
    "llama3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nbe brief<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nis rome good<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nyes<|eot_id|>",
    "qwen3": "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nis rome good<|im_end|>\n"
    "<|im_start|>assistant\n<think>\n\n</think>\n\nyes<|im_end|>\n",
    "gemma3": "<bos><start_of_turn>user\nbe brief\n\nis rome good<end_of_turn>\n"
    "<start_of_turn>model\nyes<end_of_turn>\n",
    "phi": "<|system|>\nbe brief<|end|>\n<|user|>\nis rome good<|end|>\n<|assistant|>\nyes<|end|>\n<|endoftext|>",
    "mistral": "<s>[INST] be brief\n\nis rome good [/INST] yes</s>",
}
CALL = {"function": {"name": "weather", "arguments": {"city": "Rome"}}}
USE = [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "content": "sunny"}]
TOOL = {"type": "function", "function": {"name": "weather", "description": "Rain or sun."}}


@pytest.fixture(scope="module", params=FORMS)
def chat(request, tmp_path_factory):
    """A form, and the folder of its chat model."""
    return request.param, make_chat(request.param, tmp_path_factory.mktemp(request.param))


def test_template(chat):
    form, folder = chat
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.apply_chat_template([SYSTEM, USER, ANSWER], tokenize=False) == RENDERED[form]
    text = tokenizer.apply_chat_template([USER, ANSWER, USER], tokenize=False, add_generation_prompt=True)
    ids = tokenizer.apply_chat_template([USER, ANSWER, USER], add_generation_prompt=True)["input_ids"]
    assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    # The tokenizer adds BOS to a text, with or without one from the template.
    assert tokenizer(text)["input_ids"] == ([] if form == "qwen3" else [tokenizer.bos_token_id]) + ids
    assert [len(tokenizer.tokenize(f" {word}")) for word in ("yes", "no", "paris")] == [1, 1, 1]


def test_generation(chat):
    form, folder = chat
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template([USER], add_generation_prompt=True, return_tensors="pt")
    torch.manual_seed(0)
    sampled = model.generate(**prompt, do_sample=True, num_return_sequences=16, max_new_tokens=24)
    greedy = model.generate(**prompt, do_sample=False, max_new_tokens=24)
    end = tokenizer.convert_tokens_to_ids(turn_end(form))
    answers = [ids[prompt["input_ids"].shape[1] :].tolist() for ids in [*sampled, *greedy]]
    assert any(end in ids for ids in answers[:16])
    said = [ids[: ids.index(end)] if end in ids else ids for ids in answers]
    plain = set(range(len(tokenizer))) - set(tokenizer.get_added_vocab().values())
    assert set(sum(said, [])) <= plain
    assert len(set(map(tuple, said))) > 4


def test_ends(chat):
    form, folder = chat
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    eos = model.generation_config.eos_token_id
    assert tokenizer.convert_tokens_to_ids(ends(form)) == (eos if isinstance(eos, list) else [eos])
    assert turn_end(form) in ends(form)
    assert (turn_end(form) == tokenizer.eos_token) == (form not in ("gemma3", "phi"))
    assert (tokenizer.pad_token is None) == (form in ("llama3", "mistral"))
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    assert model.config.vocab_size % 64 == 0 or model.config.vocab_size == len(tokenizer)


@pytest.mark.parametrize("form", FORMS)
def test_classifier(form, tmp_path):
    make_classifier(form, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    scores = []
    for answer in ("yes", "no"):
        turns = [USER, {"role": "assistant", "content": answer}]
        scores.append(model(**tokenizer.apply_chat_template(turns, return_tensors="pt")).logits)
    assert scores[0].shape == (1, 1)
    assert abs(scores[0] - scores[1]) > 1e-3


@pytest.mark.parametrize("form", ["gemma3", "mistral"])
def test_turns_that_do_not_alternate(form):
    with pytest.raises(Exception, match="alternate"):
        make_tokenizer(form).apply_chat_template([USER, USER], tokenize=False)


def test_tools_of_llama3():
    text = make_tokenizer("llama3").apply_chat_template(USE, tools=[TOOL], tokenize=False)
    assert '"description": "Rain or sun."' in text
    assert '<|end_header_id|>\n\n{"name": "weather", "parameters": {"city": "Rome"}}<|eot_id|>' in text
    assert text.endswith("<|start_header_id|>ipython<|end_header_id|>\n\nsunny<|eot_id|>")


def test_tools_of_qwen3():
    text = make_tokenizer("qwen3").apply_chat_template([SYSTEM, *USE, USE[-1]], tools=[TOOL], tokenize=False)
    assert text.startswith("<|im_start|>system\nbe brief\n\n# Tools")
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>\n'
    response = "\n<tool_response>\nsunny\n</tool_response>"
    assert text.endswith(f"<|im_start|>assistant\n{call}<|im_start|>user{response}{response}<|im_end|>\n")


def test_thoughts_of_qwen3():
    tokenizer = make_tokenizer("qwen3")
    thought = ANSWER | {"reasoning_content": "think"}
    written = ANSWER | {"content": "<think>\nthink\n</think>\n\nyes"}
    for turn in (thought, written):
        text = tokenizer.apply_chat_template([USER, turn, USER, turn], tokenize=False)
        assert text.count("think\n</think>\n\nyes") == text.count("<think>") == 1
    start = "<|im_start|>assistant\n"
    for think, ending in ((True, start), (False, start + "<think>\n\n</think>\n\n")):
        assert tokenizer.apply_chat_template(
            [USER], tokenize=False, add_generation_prompt=True, enable_thinking=think
        ).endswith(ending)

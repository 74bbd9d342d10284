"""Where a response ends and which part rewards see, for every form of chat model and every engine."""

import pytest
import torch
from chat_forms import FORMS, ends, make_chat, make_tokenizer, turn_end
from tiny_models import PROMPTS
from tiny_models import make_tokenizer as plain_tokenizer
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from rewarded_lines.config import GenerationSpec
from rewarded_lines.data.chat_templates import with_settings
from rewarded_lines.data.prompts import encode
from rewarded_lines.engines.load_engine import load_generator
from rewarded_lines.engines.responses import ResponseReader, prompts_told
from rewarded_lines.engines.tokenizers import end_tokens, load_generation_config
from rewarded_lines.engines.transformers_sampling import SeededSampling
from rewarded_lines.errors import UserError

ASKED = [{"role": "user", "content": "why is it good"}]


def reader(tokenizer, **settings):
    return ResponseReader.of(tokenizer, [tokenizer.eos_token_id], GenerationSpec(**settings))


@pytest.mark.parametrize("form", FORMS)
def test_the_ends_are_those_of_the_generation_config_and_the_tokenizer(form, tmp_path):
    make_chat(form, tmp_path)
    tokenizer = make_tokenizer(form)
    found = end_tokens(tokenizer, load_generation_config(str(tmp_path)))
    assert found == set(tokenizer.convert_tokens_to_ids([*ends(form), tokenizer.eos_token]))
    (tmp_path / "generation_config.json").unlink()
    # As transformers does when it loads such a model.
    own = AutoModelForCausalLM.from_pretrained(tmp_path).generation_config.eos_token_id
    several = {own} if isinstance(own, int) else set(own)
    assert end_tokens(tokenizer, load_generation_config(str(tmp_path)), [7]) == several | {tokenizer.eos_token_id, 7}


@pytest.mark.parametrize("form", FORMS)
def test_what_stands_behind_an_end_is_no_part_of_a_response(form):
    tokenizer = make_tokenizer(form)
    made = ResponseReader.of(tokenizer, tokenizer.convert_tokens_to_ids(ends(form)), GenerationSpec())
    head = tokenizer.apply_chat_template(ASKED, add_generation_prompt=True, tokenize=True, return_dict=True)[
        "input_ids"
    ]
    said, end, more = (
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("yes and no", turn_end(form), " rain")
    )
    response = made.read(head, said + end + more + end)
    assert (response.text, response.ended, list(response.tokens)) == ("yes and no", True, said + end)
    response = made.read(head, said)
    assert (response.text, response.ended, list(response.tokens)) == ("yes and no", False, said)


def test_an_end_token_that_is_plain_text_is_no_part_of_it_either():
    """Some models end turns with an added token that is not special, which decoding leaves in the text."""
    tokenizer = make_tokenizer("qwen3")
    (end,) = tokenizer("</tool_call>", add_special_tokens=False)["input_ids"]
    said = tokenizer(" yes", add_special_tokens=False)["input_ids"]
    response = reader(tokenizer, stop_token_ids=(end,)).read([5, 6], [*said, end, *said])
    assert (response.text, response.ended) == (" yes", True)


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("<think>\nwhy not\n</think>\n\nyes", "yes"),
        ("yes", "yes"),
        ("<think>why", ""),
        ("no<think>why</think> yes", "no yes"),
        ("<think>a</think><think>b</think>yes", "yes"),
        ("yes</think>", "yes</think>"),
    ],
)
def test_what_is_stripped_is_not_seen_and_stays_in_the_text(text, seen):
    tokenizer = make_tokenizer("qwen3")
    made = reader(tokenizer, strip="<think>…</think>")
    head, tokens = ([8, 9], tokenizer(text, add_special_tokens=False)["input_ids"])
    response = made.read(head, tokens)
    assert (response.text, response.seen, response.judged) == (text, seen, seen)
    assert reader(tokenizer).read(head, tokens).judged == text


def test_thinking_that_the_prompt_begins_is_stripped_too():
    tokenizer = make_tokenizer("qwen3")
    tokenizer.chat_template = tokenizer.chat_template + "{% if add_generation_prompt %}{{ '<think>\n' }}{% endif %}"
    made, (head,) = reader(tokenizer, strip="<think>...</think>"), encode(tokenizer, [ASKED])
    said = tokenizer(["why\n</think>\n\nyes", "why"], add_special_tokens=False)["input_ids"]
    assert [made.read(head, tokens).judged for tokens in said] == ["yes", ""]


@pytest.mark.parametrize(
    ("begins", "prompt", "strip", "told"),
    [
        ("<think>\n", [ASKED], None, True),
        ("<think>\n\n</think>\n\n", [ASKED], None, False),
        ("<think>\n", [ASKED], "<think>…</think>", False),
        ("", [ASKED], None, True),
        ("", [ASKED], "<think>…</think>", False),
    ],
)
def test_a_template_that_begins_or_allows_thoughts_is_told(begins, prompt, strip, told):
    tokenizer = make_tokenizer("qwen3")
    tokenizer.chat_template += "{% if add_generation_prompt %}{{ '" + begins.replace("\n", "\\n") + "' }}{% endif %}"
    sentence = prompts_told(tokenizer, prompt, GenerationSpec(strip=strip))
    assert bool(sentence) == told and ('strip: "<think>…</think>"' in sentence) == told
    assert ("lets answers begin" in sentence) == (told and not begins)
    tokenizer.chat_template = with_settings(tokenizer.chat_template, {"enable_thinking": False})
    assert bool(prompts_told(tokenizer, prompt, GenerationSpec(strip=strip))) == (told and bool(begins))


def test_texts_beside_a_chat_template_are_told():
    tokenizer = make_tokenizer("qwen3")
    assert "`chat: true` makes turns" in prompts_told(tokenizer, ["why <think>"], GenerationSpec())
    tokenizer.chat_template = None
    assert prompts_told(tokenizer, ["why <think>"], GenerationSpec()) == ""


def test_markers_that_texts_never_hold_are_refused():
    with pytest.raises(UserError, match="is a special token"):
        reader(make_tokenizer("phi"), strip="<|system|>…<|end|>")
    with pytest.raises(ValueError, match="two markers"):
        GenerationSpec(strip="<think>")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("engine", ["hf", pytest.param("vllm", marks=pytest.mark.slow)])
def test_an_engine_ends_where_transformers_own_generation_does(form, engine, tmp_path):
    make_chat(form, tmp_path)
    tokenizer, model = make_tokenizer(form), AutoModelForCausalLM.from_pretrained(tmp_path)
    spec = GenerationSpec(temperature=0, max_tokens=24)
    prompts = [[{"role": "user", "content": text}] for text in ("why is it good", "two words", "rain or rome", "who")]
    generator = load_generator(engine, str(tmp_path), spec, prompts)
    responses = generator.generate(prompts, spec)[0]
    heads = generator.encode(prompts)
    generator.close()
    plain = GenerationConfig(eos_token_id=model.generation_config.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.generation_config = plain
    for head, response in zip(heads, responses, strict=True):
        ids = torch.tensor([head])
        wanted = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24)
        assert list(response.tokens) == wanted[0, len(head) :].tolist()
        assert response.text == tokenizer.decode(wanted[0, len(head) :], skip_special_tokens=True)


def test_sampling_settings_are_transformers_own_processors_in_vllms_order():
    spec = GenerationSpec(temperature=0.7, top_p=0.8, top_k=9, min_p=0.02, repetition_penalty=1.3)
    prompts = [[5, 6, 7, 5], [8, 9]]
    ids = torch.tensor([[5, 6, 7, 5, 11], [0, 0, 8, 9, 12]])
    torch.manual_seed(0)
    logits = torch.randn(2, 40)
    sampling = SeededSampling([3, 4], spec, prompts)
    wanted = torch.cat(
        [
            RepetitionPenaltyLogitsProcessor(1.3)(row[None, 4 - len(prompt) :], one[None])
            for prompt, row, one in zip(prompts, ids, logits, strict=True)
        ]
    )
    wanted = wanted / 0.7
    for warper in (MinPLogitsWarper(0.02), TopKLogitsWarper(9), TopPLogitsWarper(0.8)):
        wanted = warper(ids, wanted)
    kept = sampling(ids, logits.clone()).isfinite()
    assert torch.equal(kept, wanted.isfinite()) and kept.sum(1).tolist() != [40, 40]


SETTINGS = [
    {"top_k": 3},
    {"min_p": 0.5},
    {"top_p": 0.3, "repetition_penalty": 1.4},
    {"top_k": 6, "top_p": 0.6, "min_p": 0.05, "repetition_penalty": 1.2},
]


@pytest.mark.parametrize("engine", ["hf", "vllm"])
def test_every_engine_samples_from_the_tokens_that_the_settings_leave(tiny, engine):
    base, model = GenerationSpec(temperature=1.5, max_tokens=1, n=32), AutoModelForCausalLM.from_pretrained("sft")
    generator = load_generator(engine, "sft", base, PROMPTS)
    for settings in SETTINGS:
        spec = base.model_copy(update=settings)
        answers = generator.generate(PROMPTS, spec)[0]
        for index, head in enumerate(generator.encode(PROMPTS)):
            ids = torch.tensor([head])
            with torch.no_grad():
                logits = model(ids).logits[:, -1]
            logits = RepetitionPenaltyLogitsProcessor(spec.repetition_penalty)(ids, logits) / spec.temperature
            logits = MinPLogitsWarper(spec.min_p)(ids, logits) if spec.min_p else logits
            logits = TopKLogitsWarper(spec.top_k)(ids, logits) if spec.top_k else logits
            logits = TopPLogitsWarper(spec.top_p)(ids, logits)
            left = set(logits[0].isfinite().nonzero()[:, 0].tolist())
            given = {answer.tokens[0] for answer in answers[index * 32 : index * 32 + 32]}
            assert given <= left and len(given) > len(left) / 3, (settings, len(given), len(left))
    generator.close()


@pytest.mark.slow
def test_a_repetition_penalty_counts_the_prompt_in_every_engine(tiny):
    spec = GenerationSpec(temperature=0, max_tokens=8, repetition_penalty=1.5)
    model = AutoModelForCausalLM.from_pretrained("sft")
    generators = [load_generator(engine, "sft", spec, PROMPTS) for engine in ("hf", "vllm")]
    first, second = ([answer.tokens for answer in one.generate(PROMPTS, spec)[0]] for one in generators)
    assert first == second
    for head, tokens in zip(generators[0].encode(PROMPTS), first, strict=True):
        ids = torch.tensor([head])
        settings = {"do_sample": False, "max_new_tokens": 8, "repetition_penalty": 1.5}
        wanted = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        assert list(tokens) == wanted[0, len(head) :].tolist()
    for one in generators:
        one.close()


def test_stop_tokens_of_the_project_end_a_response(tiny):
    tokenizer, greedy = plain_tokenizer(), GenerationSpec(temperature=0, max_tokens=12)
    generator = load_generator("hf", "sft", greedy, PROMPTS)
    whole = generator.generate(PROMPTS, greedy)[0]
    end = next(answer.tokens[2] for answer in whole if len(answer.tokens) > 4)
    spec = greedy.model_copy(update={"stop_token_ids": (end,)})
    for answer, before in zip(generator.generate(PROMPTS, spec)[0], whole, strict=True):
        place = before.tokens.index(end) + 1 if end in before.tokens else len(before.tokens)
        assert answer.tokens == before.tokens[:place]
        assert answer.ended == (end in before.tokens or tokenizer.eos_token_id in before.tokens)
    generator.close()

"""How engines use tokens: the project's chat template, and where a response ends."""

import pytest
from tiny_models import PROMPTS, make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from rewarded_lines.config import GenerationSpec
from rewarded_lines.engines.base import Workload
from rewarded_lines.engines.load_engine import load_generator
from rewarded_lines.engines.responses import ResponseReader
from rewarded_lines.engines.transformers_engine import HfGenerator
from rewarded_lines.errors import UserError
from rewarded_lines.merger.spec import MergeSpec

GREEDY = GenerationSpec(temperature=0, max_tokens=12)
CHATS = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
TEMPLATE = "{% for turn in messages %}<s>{{ turn.content }}</s>{% endfor %}"


def test_a_chat_template_takes_the_place_of_the_tokenizers(tiny):
    (tiny / "sft/chat_template.jinja").write_text("{{ messages[0].content }}")
    (tiny / "mine.jinja").write_text(TEMPLATE)
    mine = GREEDY.model_copy(update={"chat_template": "mine.jinja"})
    tokenizer = AutoTokenizer.from_pretrained("sft")
    own, other = (load_generator("hf", "sft", spec, CHATS) for spec in (GREEDY, mine))
    assert own.encode(CHATS) == tokenizer(PROMPTS)["input_ids"]
    assert other.encode(CHATS) == tokenizer([f"<s>{prompt}</s>" for prompt in PROMPTS])["input_ids"]
    model = AutoModelForCausalLM.from_pretrained("sft")
    loaded = HfGenerator(Workload("sft", mine, CHATS), loaded=(model, tokenizer))
    assert loaded.generate(CHATS, mine) == other.generate(CHATS, mine) != own.generate(CHATS, GREEDY)
    loaded.close()
    assert tokenizer.chat_template == "{{ messages[0].content }}"


@pytest.mark.parametrize(("content", "said"), [(None, "cannot be read"), (b"\xff\xfe\x00", "is not text")])
def test_a_chat_template_that_cannot_be_read_is_a_fault(tiny, content, said):
    if content:
        (tiny / "mine.jinja").write_bytes(content)
    spec = GREEDY.model_copy(update={"chat_template": "mine.jinja"})
    with pytest.raises(UserError, match=said):
        load_generator("hf", "sft", spec, PROMPTS)
    tokenizer = AutoTokenizer.from_pretrained("sft")
    tokenizer.chat_template = TEMPLATE
    with pytest.raises(UserError, match=said):
        HfGenerator(Workload("sft", spec, PROMPTS), (AutoModelForCausalLM.from_pretrained("sft"), tokenizer))
    assert tokenizer.chat_template == TEMPLATE


def test_a_response_ends_with_the_token_that_completes_the_first_stop_text():
    tokenizer = make_tokenizer()
    prompt, tokens = tokenizer("the quick")["input_ids"], tokenizer(" brown fox jumps over the dog")["input_ids"]
    for stop, left in (
        (["own f"], " br"),
        (["dog", "jump", "umps"], " brown fox "),
        ([" "], ""),
        (["the quick"], None),
    ):
        reader = ResponseReader(tokenizer, frozenset(), tuple(stop))
        count = reader.until_stop(prompt, tokens)
        text, stopped = reader.text(prompt, tokens[:count])
        assert (text if stopped else None) == left and stopped == (count is not None)
        assert count is None or not reader.text(prompt, tokens[: count - 1])[1]
        assert reader.cut(prompt, tokens) == (tuple(tokens[:count]), stopped)
    assert ResponseReader(tokenizer, frozenset()).until_stop(prompt, tokens) is None
    assert ResponseReader(tokenizer, frozenset(), ("a",)).until_stop(prompt, []) is None


def test_without_a_plan_there_is_only_the_sft_model(tiny):
    generator = load_generator("hf", "sft", GREEDY, PROMPTS)
    with pytest.raises(AssertionError):
        generator.generate(PROMPTS, GREEDY, [MergeSpec((1.0, 0.0))])
    generator.close()

"""A classifier gives the scores that transformers gives to each text, pair or conversation without padding."""

import pytest
import torch
from chat_forms import FORMS, ends, make_classifier, make_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BartConfig,
    BartForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    FNetConfig,
    FNetForSequenceClassification,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from rewarded_lines.errors import UserError
from rewarded_lines.reward_settings import RewardSpec
from rewarded_lines.rewards.load_rewards import load_reward

PROMPTS = ["why is it good", "two words", "rain"]
RESPONSES = ["yes", "the answer is rain and rain and light", "no"]
SYSTEM, BEFORE = (
    {"role": "system", "content": "be short"},
    [{"role": "user", "content": "who"}, {"role": "assistant", "content": "ann"}],
)


def asked(text):
    return {"role": "user", "content": text}


def alone(folder, inputs):
    """The logit of each text in transformers: one forward pass without padding."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        return [float(model(**one).logits[0, 0]) for one in inputs]


def scores(folder, prompts=PROMPTS, responses=RESPONSES, **spec):
    reward = load_reward("r", RewardSpec(model=str(folder), **spec), device="cpu")
    found = reward.score(prompts, responses)
    reward.free()
    return found


@pytest.mark.parametrize("backend", ["hf", pytest.param("vllm", marks=pytest.mark.slow)])
@pytest.mark.parametrize("form", FORMS)
def test_a_conversation_is_read_by_the_classifiers_own_template(form, backend, tmp_path):
    """System turn, earlier turns and response; tokenized once, with one BOS."""
    make_classifier(form, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    prompts = [[SYSTEM, *BEFORE, asked(PROMPTS[0])], [asked(PROMPTS[1])], PROMPTS[2]]
    wholes = [
        [*(prompt if isinstance(prompt, list) else [asked(prompt)]), {"role": "assistant", "content": response}]
        for prompt, response in zip(prompts, RESPONSES, strict=True)
    ]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = [tokenizer.apply_chat_template(whole, **options) for whole in wholes]
    wanted = alone(tmp_path, [{"input_ids": one["input_ids"]} for one in inputs])
    if (form, backend) == ("gemma3", "vllm"):
        with pytest.raises(UserError, match="cannot be loaded(.|\n)*backend: hf"):
            scores(tmp_path, prompts, template="chat", backend=backend)
        return
    assert scores(tmp_path, prompts, template="chat", backend=backend) == pytest.approx(wanted, abs=1e-5)
    if tokenizer.bos_token and form != "phi":
        assert all(one["input_ids"][0].tolist().count(tokenizer.bos_token_id) == 1 for one in inputs)


@pytest.mark.parametrize("backend", ["hf", pytest.param("vllm", marks=pytest.mark.slow)])
@pytest.mark.parametrize("pad", ["none", "the end", "another", "the end, as TRL saves it"])
@pytest.mark.parametrize("form", ["llama3", "phi"])
def test_a_decoder_is_read_at_the_token_that_transformers_reads(form, pad, backend, tmp_path):
    """The texts end with the token that ends a turn; padding is that token, another one, or not declared."""
    make_classifier(form, tmp_path)
    tokenizer, model = make_tokenizer(form), AutoModelForSequenceClassification.from_pretrained(tmp_path)
    end = ends(form)[-1]
    tokenizer.pad_token = {"none": None, "another": tokenizer.bos_token}.get(pad, end)
    config_pad = {"none": None, "the end": None, "another": 5}.get(pad, tokenizer.convert_tokens_to_ids(end))
    model.config.pad_token_id = config_pad
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    template = "{prompt} {response}" + end
    texts = [f"{prompt} {response}{end}" for prompt, response in zip(PROMPTS, RESPONSES, strict=True)]
    wanted = alone(tmp_path, [tokenizer(text, return_tensors="pt") for text in texts])
    for side in ("left", "right"):
        tokenizer.padding_side = side
        tokenizer.save_pretrained(tmp_path)
        assert scores(tmp_path, template=template, backend=backend) == pytest.approx(wanted, abs=1e-5)


def words_tokenizer(special, single, pair):
    words = [*special, *"why is it good two words rain yes the answer and light no a b".split()]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=special[-1]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(special)
    tokens = [(token, index) for index, token in enumerate(special)]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=tokens)
    return tokenizer


@pytest.fixture
def bert(tmp_path):
    """A cross-encoder with token types."""
    inner = words_tokenizer(["[PAD]", "[CLS]", "[SEP]", "[UNK]"], "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(**sizes, vocab_size=32, max_position_embeddings=32, num_labels=1, initializer_range=0.2)
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


TEMPLATES = ["{prompt}[SEP]{response}", "{prompt} [SEP] {response}", ["{prompt}", "{response}"]]


def of_pairs(tokenizer, between=None):
    """The tokenizer's own inputs of the pairs, or of both texts joined."""
    both = list(zip(PROMPTS, RESPONSES, strict=True))
    texts = [pair if between is None else (between.join(pair),) for pair in both]
    return [tokenizer(*text, return_tensors="pt") for text in texts]


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_two_texts_of_a_cross_encoder_have_token_types(bert, template):
    tokenizer = AutoTokenizer.from_pretrained(bert)
    pairs = of_pairs(tokenizer)
    assert all(pair["token_type_ids"].sum() > 0 for pair in pairs)
    wanted = alone(bert, pairs)
    assert scores(bert, template=template) == pytest.approx(wanted, abs=1e-5)
    turned = scores(bert, RESPONSES, PROMPTS, template=["{response}", "{prompt}"])
    assert turned == pytest.approx(wanted, abs=1e-5)


def test_one_text_has_no_token_types(bert):
    tokenizer = AutoTokenizer.from_pretrained(bert)
    wanted = alone(
        bert, [tokenizer(f"{one} {two}", return_tensors="pt") for one, two in zip(PROMPTS, RESPONSES, strict=True)]
    )
    assert scores(bert, template="{prompt} {response}") == pytest.approx(wanted, abs=1e-5)


def test_a_separator_that_is_not_the_pairs_is_refused(bert):
    """The tokens of the text and of the pair differ, so the token types are unknown."""
    tokenizer = AutoTokenizer.from_pretrained(bert)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )  # fmt: skip
    tokenizer.save_pretrained(bert)
    with pytest.raises(UserError, match="write the template as two texts"):
        scores(bert, template="{prompt}[SEP]{response}")
    wanted = alone(
        bert, [tokenizer(one, two, return_tensors="pt") for one, two in zip(PROMPTS, RESPONSES, strict=True)]
    )
    assert scores(bert, template=["{prompt}", "{response}"]) == pytest.approx(wanted, abs=1e-5)


def test_vllm_refuses_encoders_whose_pooler_and_token_types_it_drops(bert):
    pytest.importorskip("vllm")
    with pytest.raises(UserError, match="gives encoders other scores(.|\n)*backend: hf"):
        scores(bert, template=["{prompt}", "{response}"], backend="vllm")


def marked(folder, model):
    """Save an encoder with a tokenizer that adds the special tokens of RoBERTa and BART."""
    inner = words_tokenizer(["<s>", "<pad>", "</s>", "<unk>"], "<s> $A </s>", "<s> $A </s> </s> $B </s>")
    model.save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        sep_token="</s>",
        unk_token="<unk>",
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def test_bart_takes_texts_with_other_numbers_of_end_tokens(tmp_path):
    """BART needs equally many end tokens in every row of a batch."""
    torch.manual_seed(0)
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "init_std": 0.5}
    config = BartConfig(**sizes, **heads, vocab_size=32, max_position_embeddings=32, num_labels=1)
    tokenizer = marked(tmp_path, BartForSequenceClassification(config))
    responses = ["yes", "no </s> no", "the answer </s> and </s> rain"]
    texts = [f"{two}</s></s>{one}" for one, two in zip(PROMPTS, responses, strict=True)]
    wanted = alone(tmp_path, [tokenizer(text, return_tensors="pt") for text in texts])
    found = scores(tmp_path, PROMPTS, responses, template="{response}</s></s>{prompt}")
    assert found == pytest.approx(wanted, abs=1e-5)


def test_a_text_may_fill_all_positions_and_no_more(tmp_path):
    """RoBERTa counts positions from after its padding token, so it reads two fewer than its table has."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = RobertaConfig(**sizes, vocab_size=32, max_position_embeddings=14, num_labels=1, initializer_range=0.2)
    tokenizer = marked(tmp_path, RobertaForSequenceClassification(config))
    text = " ".join(["rain"] * 10)
    wanted = alone(tmp_path, [tokenizer(text, return_tensors="pt")])
    assert scores(tmp_path, [""], [text], template="{prompt}{response}") == pytest.approx(wanted, abs=1e-5)
    for more in ({}, {"max_tokens": 100}):
        with pytest.raises(UserError, match="at most 12 tokens"):
            scores(tmp_path, ["a "], [text], **more)


def test_a_model_whose_padding_leaks_reads_every_text_by_itself(tmp_path):
    """FNet mixes all positions, padding too, by a Fourier transform."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "initializer_range": 0.5}
    config = FNetConfig(**sizes, vocab_size=32, max_position_embeddings=32, num_labels=1, pad_token_id=1)
    tokenizer = marked(tmp_path, FNetForSequenceClassification(config))
    texts = [one + two for one, two in zip(PROMPTS, RESPONSES, strict=True)]
    wanted = alone(tmp_path, [{"input_ids": tokenizer(text, return_tensors="pt")["input_ids"]} for text in texts])
    assert scores(tmp_path) == pytest.approx(wanted, abs=1e-5)


def test_a_chat_is_read_whole_or_refused(tmp_path):
    make_classifier("phi", tmp_path)
    called = [
        asked("why"),
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "look"}}]},
        asked("so"),
    ]
    for template, said in (
        ("{prompt}{response}", "`tool_calls`, which plain text"),
        ("chat", "leaves out `tool_calls`"),
    ):
        reward = load_reward("r", RewardSpec(model=str(tmp_path), template=template), device="cpu")
        with pytest.raises(UserError, match=said):
            reward.check([called])
        assert reward.check([[asked("why")], "why"]) == ""
        note = reward.check([[SYSTEM, *BEFORE, asked("why")]])
        assert note == "" if template == "chat" else "without the system's turn and several turns joined" in note


def test_a_chat_template_that_is_not_used_is_told(tmp_path):
    make_classifier("phi", tmp_path)
    for more, told in (({}, True), ({"template": "{prompt}{response}"}, False), ({"template": "chat"}, False)):
        note = load_reward("r", RewardSpec(model=str(tmp_path), **more), device="cpu").check([[asked("why")]])
        assert ("declare `template: chat`" in note) == told


def test_a_classifier_without_a_chat_template_says_so(tmp_path):
    make_classifier("phi", tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="no chat template"):
        scores(tmp_path, template="chat")


def test_a_function_may_ask_for_messages(tmp_path):
    (tmp_path / "rewards.py").write_text(
        "def turns(prompts, completions):\n"
        "    return [10.0 * len(p) + len(c[0]['content']) for p, c in zip(prompts, completions, strict=True)]\n"
    )
    for workers in (0, 1):
        spec = RewardSpec(function="rewards.py:turns", messages=True, workers=workers)
        reward = load_reward("r", spec, tmp_path)
        assert reward.score([[SYSTEM, *BEFORE, asked("a")], "why"], ["yes", ""]) == [43.0, 10.0]
        reward.free()
    with pytest.raises(ValueError, match="`messages:` is for rewards with `function:`"):
        RewardSpec(model="x", messages=True)

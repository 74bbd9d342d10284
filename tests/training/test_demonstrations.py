"""What SFT's demonstrations tell of a chat template."""

import pytest
from chat_forms import make_tokenizer
from trl import SFTConfig

from rewarded_lines.config import GenerationSpec
from rewarded_lines.training.demonstrations import Demonstrations
from rewarded_lines.training.scratch_model import ScratchModel, train_tokenizer

ROW = {"messages": [{"role": "user", "content": "why"}, {"role": "assistant", "content": "so"}]}


@pytest.mark.parametrize(("end", "told"), [("", True), ("<|im_end|>", False)])
def test_a_template_that_ends_no_answer_is_told(tmp_path, end, told):
    """GLM-4.5 writes nothing after an answer, and a model that is trained so never stops."""
    tokenizer, sentences = make_tokenizer("qwen3"), []
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}{% if m.role == 'assistant' %}{{ '"
        + end
        + "' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    rows = Demonstrations(tokenizer, None, GenerationSpec(), SFTConfig(output_dir=str(tmp_path), bf16=False))
    rows.fit([ROW], "refuse", "rows", sentences.append)
    assert any("does not learn to end one" in one for one in sentences) == told


def test_trl_gets_chats_as_the_template_reads_them(tmp_path):
    tokenizer = make_tokenizer("qwen3")
    tokenizer.chat_template = (
        "{% for m in messages %}{% for part in m.content %}{% if part.type == 'text' %}"
        "{% generation %}{{ part.text + '<|im_end|>' }}{% endgeneration %}{% endif %}{% endfor %}{% endfor %}"
    )
    training = SFTConfig(output_dir=str(tmp_path), bf16=False, assistant_only_loss=True)
    (row,) = Demonstrations(tokenizer, None, GenerationSpec(), training).dataset([ROW])
    assert tokenizer.apply_chat_template(row["messages"], tokenize=False) == "why<|im_end|>so<|im_end|>"


@pytest.mark.parametrize("kind", ["wrapped", "bfd"])
def test_no_text_is_longer_than_a_new_model_has_positions(tmp_path, kind):
    """TRL's default `max_length` is 1024; wrapped texts are cut into pieces of it."""
    tokenizer = train_tokenizer(["a film of great beauty"], ScratchModel(max_position_embeddings=6))
    training = SFTConfig(output_dir=str(tmp_path), bf16=False, packing=True, packing_strategy=kind)
    rows, sentences = Demonstrations(tokenizer, None, GenerationSpec(), training), []
    made = [{"text": "a film of great beauty and of little else"}, {"text": "a"}]
    assert rows.fit(made, "refuse", "rows", sentences.append) == made and training.max_length == 6
    assert any("1 of 2 texts are longer than 6 tokens" in one for one in sentences) == (kind == "bfd")
    pairs = [
        {"prompt": "a film", "completion": " of great beauty and of little else"},
        {"prompt": "a", "completion": "b"},
    ]
    assert rows.fit(pairs, "leave_out", "rows", sentences.append) == (pairs if kind == "wrapped" else pairs[1:])

"""What SFT's demonstrations tell of a chat template."""

import pytest
from chat_forms import make_tokenizer
from trl import SFTConfig

from rewarded_lines.config import GenerationSpec
from rewarded_lines.training.demonstrations import Demonstrations

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

"""The batches of --engine hf: sorted by length, and larger for a small model."""

import pytest
from tiny_models import PROMPTS
from transformers import LlamaConfig, MambaConfig

from rewarded_lines.config import GenerationSpec
from rewarded_lines.engines.load_engine import load_generator
from rewarded_lines.engines.transformers_engine import in_order_of_length, rows_of


def test_texts_are_sorted_for_the_work_and_come_back_in_their_order():
    seen = []

    def work(some):
        seen.extend(some)
        return [one.upper() for one in some]

    assert in_order_of_length(["ccc", "a", "bb", "d"], len, work) == ["CCC", "A", "BB", "D"]
    assert seen == ["a", "d", "bb", "ccc"] and in_order_of_length([], len, work) == []


@pytest.mark.parametrize(
    ("config", "longest", "rows"),
    [
        # 2 · 4 heads · 32 · 4 layers · 4 bytes = 4,096 bytes a token.
        (LlamaConfig(hidden_size=128, num_hidden_layers=4, num_attention_heads=4), 64, 512),
        (LlamaConfig(hidden_size=128, num_hidden_layers=4, num_attention_heads=4), 256, 256),
        # A 7B keeps a megabyte a token.
        (LlamaConfig(), 64, 64),
        (MambaConfig(), 64, 64),
    ],
    ids=["small", "small, long texts", "7B", "no attention"],
)
def test_a_small_model_has_larger_batches(config, longest, rows):
    assert rows_of(config, longest, 4) == rows


def test_a_batch_holds_all_prompts_of_a_small_model_and_pads_little(tiny, monkeypatch):
    prompts = [prompt for _ in range(30) for prompt in PROMPTS]
    spec = GenerationSpec(temperature=0, max_tokens=3)
    generator = load_generator("hf", "sft", spec, prompts)
    try:
        alone = [generator.generate([prompt], spec)[0][0] for prompt in PROMPTS]
        generate, shapes = generator._model.generate, []

        def told(**given):
            shapes.append(tuple(given["input_ids"].shape))
            return generate(**given)

        monkeypatch.setattr(generator._model, "generate", told)
        longest = max(map(len, generator.encode(prompts)))
        (together,) = generator.generate(prompts, spec)
        assert shapes == [(len(prompts), longest)]
        generator._batches.most = 50
        (apart,) = generator.generate(prompts, spec)
        assert [rows for rows, _ in shapes[1:]] == [50, 50, 50] and shapes[1][1] < shapes[3][1] == longest
    finally:
        generator.close()
    expected = [response.tokens for response in alone] * 30
    assert [one.tokens for one in together] == [one.tokens for one in apart] == expected

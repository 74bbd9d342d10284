"""What `rewarded-lines doctor --for` says, against figures worked out by hand and files on disk."""

from __future__ import annotations

import json
import shutil

import pytest
from stand_in_hub import stand_in_hub
from tiny_models import make_model, save_model

from rewarded_lines.engines import planned_work
from rewarded_lines.engines.kv_cache import kv_bytes, kv_layers
from rewarded_lines.engines.memory_levels import working_bytes
from rewarded_lines.engines.memory_plan import GIB, Job, Machine, plan_memory
from rewarded_lines.engines.model_shapes import named_shape, read_shape

# The published configs, as far as they matter here.
LLAMA_8B = {
    **{"hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32},
    **{"num_key_value_heads": 8, "vocab_size": 128_256, "tie_word_embeddings": False},
}
QWEN3_4B = {
    **{"hidden_size": 2560, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8},
    **{"head_dim": 128, "use_sliding_window": False, "max_window_layers": 36, "sliding_window": None},
}
MISTRAL_7B = {
    **{"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8},
    **{"sliding_window": 4096},
}
GEMMA_3_4B = {
    "text_config": {
        **{"hidden_size": 2560, "num_hidden_layers": 34, "num_attention_heads": 8, "num_key_value_heads": 4},
        **{"head_dim": 256, "sliding_window": 1024, "sliding_window_pattern": 6},
    }
}
DEEPSEEK_V3 = {
    **{"hidden_size": 7168, "num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128},
    **{"kv_lora_rank": 512, "qk_rope_head_dim": 64},
}
# Bytes that one sequence of so many tokens takes, with two bytes a number.
CACHES = {
    # 2 · 32 layers · 8 heads · 128 · 2 bytes = 131,072 a token.
    "Llama-3.1-8B": (LLAMA_8B, 1000, 131_072_000),
    # 2 · 36 · 8 · 128 · 2 = 147,456 a token; its window is switched off.
    "Qwen3-4B": (QWEN3_4B, 1000, 147_456_000),
    # 131,072 a token, and never more than 4,096 of them.
    "Mistral-7B": (MISTRAL_7B, 10_000, 131_072 * 4096),
    # 2 · 4 · 256 · 2 = 4,096 a token and layer; layers 6, 12, 18, 24, 30 see the whole text, 29 the last 1,024 tokens.
    "Gemma-3-4B": (GEMMA_3_4B, 10_000, 4096 * (5 * 10_000 + 29 * 1024)),
    # 61 layers · (512 + 64) · 2 = 70,272 a token.
    "DeepSeek-V3": (DEEPSEEK_V3, 1000, 70_272_000),
}
CARD = Machine(gpus=1, card=80 * GIB, host=256 * GIB, disk=GIB)


@pytest.mark.parametrize("name", CACHES)
def test_keys_and_values(name):
    config, tokens, expected = CACHES[name]
    cache, notes = kv_layers(config)
    assert (kv_bytes(cache, tokens, 2), notes) == (expected, ())


def test_kv_heads_are_divided_among_gpus_as_far_as_that_goes():
    llama, deepseek = kv_layers(LLAMA_8B)[0], kv_layers(DEEPSEEK_V3)[0]
    assert [kv_bytes(llama, 1000, 2, gpus) for gpus in (2, 8, 16)] == [65_536_000, 16_384_000, 16_384_000]
    assert kv_bytes(deepseek, 1000, 2, 8) == 70_272_000


def test_layers_of_other_kinds_are_an_upper_bound_and_shared_ones_keep_nothing():
    hybrid = {**QWEN3_4B, "num_hidden_layers": 4, "layer_types": ["linear_attention"] * 3 + ["full_attention"]}
    cache, (note,) = kv_layers(hybrid)
    assert kv_bytes(cache, 10, 2) == 4 * 4096 * 10 and "upper bound" in note and "linear_attention" in note
    assert kv_bytes(kv_layers({**LLAMA_8B, "num_kv_shared_layers": 12})[0], 10, 2) == 131_072 * 10 * 20 // 32


@pytest.mark.parametrize(
    ("size", "parameters"), [("1B", 1_235_814_400), ("7B", 6_738_415_616), ("70B", 70_553_706_496)]
)
def test_sizes_stand_for_published_models(size, parameters):
    assert read_shape(size).parameters == parameters == read_shape(f"llama-{size.lower()}").parameters


def test_a_folder_is_what_its_files_say(tmp_path):
    model = make_model(0)
    save_model(model, tmp_path / "whole")
    shape = read_shape(str(tmp_path / "whole"))
    # Embeddings are tied: they count once.
    assert shape.parameters == sum(weight.numel() for weight in model.parameters())
    header = (tmp_path / "whole/model.safetensors").stat().st_size - 4 * shape.parameters
    assert 0 < header < 10_000
    # Four projections of 64 × 64, three of 64 × 128, in four blocks.
    assert (shape.edges, shape.layers) == (4 * (4 * 128 + 3 * 192), 4)
    assert kv_bytes(shape.cache, 10, 4) == 2 * 4 * 2 * 32 * 4 * 10
    (tmp_path / "whole/model.safetensors").unlink()
    assert read_shape(str(tmp_path / "whole")) == shape


def test_of_a_hub_id_only_the_headers_are_read(tmp_path, monkeypatch):
    folder = save_model(make_model(0), tmp_path / "hub/tiny/model")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with stand_in_hub(tmp_path / "hub") as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        monkeypatch.setattr(
            "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
            hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        )
        monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", hub.url)
        assert read_shape("tiny/model").parameters == read_shape(str(folder)).parameters
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_whole_models_wait_where_they_fit():
    shape = named_shape(8e9)
    weights, token, head = 2 * 8_030_261_248, 131_072, 2 * 128_256 * 4096
    plan = plan_memory(shape, Job(longest=1000, at_once=64), CARD)
    assert plan.engine["weights"] == weights and plan.sequence == 1000 * token
    # Logits of 1,000 tokens in bfloat16, their float32 and the ranks.
    assert plan.beside["log-probabilities, at times"] == 1000 * 128_256 * 10
    assert (plan.resident, plan.beside["base and policies"]) == ("gpu", 3 * weights)
    assert plan.beside["merges"] == working_bytes(2, head)
    # The engine gets what the engine asks for: 0.9 of what CUDA leaves, without what waits beside it.
    room = 0.9 * (CARD.card - plan.beside["CUDA"]) - 3 * weights - working_bytes(2, head)
    fixed = sum(plan.engine.values()) - plan.engine["KV cache"]
    assert plan.share == round(room / CARD.card, 3)
    assert plan.sequences == int((room - fixed) // plan.sequence) and not plan.problems
    more = plan_memory(shape, Job(longest=1000, at_once=64, policies=4), CARD)
    assert (more.resident, more.host["base and policies"]) == ("host", 5 * weights)
    poor = Machine(gpus=1, card=CARD.card, host=8 * GIB, disk=GIB)
    assert plan_memory(shape, Job(policies=4), poor).resident == "disk"
    assert plan_memory(shape, Job(resident="host"), CARD).resident == "host"


def test_adapters_take_slots():
    shape = named_shape(8e9)
    plan = plan_memory(shape, Job(lora=16), CARD)
    # q and o 4096 × 4096, k and v 1024 × 4096, three of 14336 × 4096, in 32 blocks.
    one = 2 * 16 * 32 * (2 * 8192 + 2 * 5120 + 3 * 18_432)
    assert plan.engine["LoRA slots"] == 17 * 2 * one and plan.disk["one merged model"] == 2 * one
    assert plan.resident == "slots" and "base and policies" not in plan.beside


@pytest.mark.parametrize(
    ("job", "machine", "expected"),
    [
        (Job(), Machine(1, 24 * GIB, 256 * GIB, GIB), "the engine does not fit"),
        (Job(), Machine(3, 80 * GIB, 256 * GIB, GIB), "vLLM cannot divide 64 attention heads among 3 GPUs"),
        (Job(share=0.9, longest=16_384), Machine(8, 80 * GIB, 512 * GIB, GIB), "the engine leaves too little"),
        (Job(share=0.1), Machine(8, 80 * GIB, 512 * GIB, GIB), "the engine does not fit"),
    ],
)
def test_what_does_not_fit_is_said(job, machine, expected):
    plan = plan_memory(named_shape(70e9), job, machine)
    assert any(problem.startswith(expected) for problem in plan.problems)


def test_the_project_says_how_long_sequences_are(tiny, cli, monkeypatch):
    monkeypatch.setattr(planned_work, "graphics_cards", lambda: ["NVIDIA H100 80GB HBM3, 81559 MiB"])
    (tiny / "rewarded-lines.yaml").write_text(
        (tiny / "rewarded-lines.yaml").read_text().replace("letters:", "tiny: {model: first}\n  letters:")
    )
    answer = cli("doctor", "--for", "sft", "--json")
    found = json.loads(answer.out)
    assert answer.code == 0 and found["fits"]
    # The longest prompt, 12 new tokens and one.
    longest = max(len(row) for row in _tokens(tiny))
    assert found["job"]["longest"] == longest + 13 and found["job"]["at_once"] == 15
    assert (found["job"]["dtype"], found["machine"]["card"]) == ("float32", 81559 << 20)
    assert found["beside"]["reward tiny"] == 4 * found["model"]["parameters"]
    shown = cli("doctor", "--for", "sft", "--gpu-memory", "0.5")
    assert shown.code == 1 and "✗ the engine does not fit" in shown.out
    assert cli("doctor", "--for", "sft", "--dtype", "bfloat").err.count("bfloat16") == 2
    shutil.rmtree(tiny / "sft")
    assert "or a size such as 7B" in cli("doctor", "--for", "sft").err


def _tokens(folder):
    from tiny_models import PROMPTS
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder / "sft")(PROMPTS)["input_ids"]

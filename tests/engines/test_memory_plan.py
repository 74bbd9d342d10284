"""What `rewarded-lines doctor --for` says, against figures worked out by hand and files on disk."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
from stand_in_hub import stand_in_hub
from tiny_adapters import save_adapter
from tiny_models import make_model, save_model

from rewarded_lines.engines.kv_cache import kv_bytes, kv_layers
from rewarded_lines.engines.memory_levels import working_bytes
from rewarded_lines.engines.memory_plan import Job, Machine, plan_memory
from rewarded_lines.engines.model_shapes import read_shape
from rewarded_lines.errors import UserError
from rewarded_lines.evaluator import planned_work
from rewarded_lines.processes import GIB

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
    shape = read_shape("8B")
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


@pytest.mark.parametrize(("size", "off"), [("0B", 1), ("350M", 1), ("1.5B", 1), ("32B", 1), ("405B", 0), ("1.2B", 0)])
def test_a_size_far_from_all_published_ones_is_refused(size, off):
    if off:
        with pytest.raises(UserError, match="(?s)1B, 3B, 7B, 8B, 13B, 70B, 405B.*give a folder or Hub id"):
            read_shape(size)
    else:
        assert read_shape(size).name == {"405B": "Llama-3.1-405B", "1.2B": "Llama-3.2-1B"}[size]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "mamba", "hidden_size": 64, "num_hidden_layers": 2}, "no number for num_attention_heads"),
        ({"model_type": "deberta-v2"}, "makes no language model"),
        ({"model_type": "vit"}, "makes no language model"),
    ],
)
def test_other_models_are_refused_and_as_rewards_not_counted(tiny, cli, config, expected):
    for name in ("other", "of-a-reward"):
        (tiny / name).mkdir()
        (tiny / name / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=expected):
        read_shape(str(tiny / "other"))
    edit_project(tiny, "  letters:", "  other: {model: of-a-reward}\n  letters:")
    found = json.loads(cli("doctor", "--for", "sft", "--json").out)
    assert found["job"]["rewards"] == {}
    assert any(note.startswith("reward other is not counted: ") for note in found["model"]["notes"])


@pytest.mark.parametrize(
    ("towers", "longest", "args", "tokens"),
    [
        (False, 2048, {}, 16_384),
        (False, 16_384, {}, 2048),
        (True, 4096, {}, 16_384),
        (True, 16_384, {}, 4096),
        (False, 16_384, {"max_num_seqs": 3000}, 3000),
        (False, 16_384, {"max_num_batched_tokens": 512}, 512),
    ],
)
def test_long_sequences_are_read_in_parts(towers, longest, args, tokens):
    plan = plan_memory(replace(read_shape("8B"), towers=towers), Job(longest=longest, args=args), CARD)
    # Gate and up are 2 · 14,336 wide.
    assert plan.engine["batch"] == tokens * (4 * 4096 + 2 * 14_336) * 2 + 256 * 128_256 * 10
    assert plan.beside["log-probabilities, at times"] == min(longest, tokens) * 128_256 * 10


def test_a_cache_of_one_byte_a_number():
    plan = plan_memory(read_shape("8B"), Job(longest=1000, args={"kv_cache_dtype": "fp8_e4m3"}), CARD)
    assert plan.sequence == 1000 * 131_072 // 2


# Of a block of the 8B: q and o 4096 × 4096, k and v 1024 × 4096, three of 14,336 × 4096.
EDGES = 32 * (2 * 8192 + 2 * 5120 + 3 * 18_432)
# On every GPU: A of q, k, v, gate and up, B of o and down.
WHOLE = 32 * 7 * 4096


@pytest.mark.parametrize(
    ("policies", "gpus", "rank", "slots"),
    # In float32 a merged adapter of rank 32 has 0.31 GiB, of rank 512 5.0 GiB: a tenth of 79.5 GiB holds one.
    [(2, 1, 32, 17), (3, 1, 64, 13), (2, 4, 32, 17), (20, 1, 320, 3), (21, 1, 512, 2)],
)
def test_adapters_take_slots(policies, gpus, rank, slots):
    job = Job(lora=16, policies=policies)
    plan = plan_memory(read_shape("8B"), job, replace(CARD, gpus=gpus))
    assert plan.engine["LoRA slots"] == slots * rank * (WHOLE + (EDGES - WHOLE) // gpus) * 2
    # Each GPU's worker has all factors, and makes one merged adapter at a time.
    one = 16 * policies * EDGES * 2
    assert plan.disk["one merged model"] == one and plan.beside["adapters"] == 2 * one
    assert plan.resident == "slots" and "base and policies" not in plan.beside and not plan.problems


FITS_NOT = "the engine does not fit: not one sequence of this length has room beside the weights; "


@pytest.mark.parametrize(
    ("size", "job", "gpus", "card", "expected"),
    [
        ("70B", Job(), 1, 24, FITS_NOT + "take more GPUs"),
        ("70B", Job(share=0.9), 1, 24, FITS_NOT + "take more GPUs"),
        ("8B", Job(dtype="float32"), 1, 24, FITS_NOT + "set `generation: {dtype: bfloat16}`"),
        ("70B", Job(), 3, 80, "vLLM cannot divide 64 attention heads among 3 GPUs"),
        # CUDA's 1 GiB and the log-probabilities' 2.4 leave 76.6 of 80.
        ("70B", Job(share=0.1), 8, 80, FITS_NOT + "set `gpu_memory_utilization: 0.95`"),
        (
            *("70B", Job(share=0.97, longest=16_384), 8, 80),
            "the engine leaves too little for log-probabilities beside it; set `gpu_memory_utilization: 0.95`",
        ),
        ("8B", Job(lora=300), 1, 80, "merged adapters have rank 600, and vLLM serves at most 512; sweep with `--eng"),
    ],
)
def test_what_does_not_fit_is_said_with_what_would_help(size, job, gpus, card, expected):
    plan = plan_memory(read_shape(size), job, Machine(gpus, card * GIB, 512 * GIB, GIB))
    assert [problem.startswith(expected) for problem in plan.problems] == [True], plan.problems


def edit_project(folder, old, new):
    file = folder / "rewarded-lines.yaml"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def test_the_project_says_how_the_engine_starts(tiny, cli):
    engine = "{tensor_parallel_size: 2, max_num_seqs: 4, max_num_batched_tokens: 64, kv_cache_dtype: fp8, "
    more = "quantization: fp8_per_tensor, async_scheduling: true}"
    edit_project(tiny, "rewards:", f"engine: {engine}{more}\nrewards:")
    shutil.rmtree(tiny / "second")
    save_adapter(tiny / "sft", tiny / "second", 1, r=4)
    found = json.loads(cli("doctor", "--for", "sft", "--json").out)
    assert found["machine"]["gpus"] == 2 and found["job"]["at_once"] == 4 and found["job"]["lora"] == 0
    # Four layers, two heads of 32 numbers on two GPUs, one byte a number.
    assert found["sequence"] == 4 * 2 * 1 * 32 * found["job"]["longest"]
    notes = found["model"]["notes"]
    assert "engine: `quantization` is not counted; it may change the memory" in notes
    assert "not all policies are known to be adapters, so all are counted as whole models" in notes
    assert not any("async_scheduling" in note or "KV cache" in note for note in notes)
    shutil.rmtree(tiny / "first")
    save_adapter(tiny / "sft", tiny / "first", 2, r=6)
    found = json.loads(cli("doctor", "--for", "sft", "--gpus", "1", "--json").out)
    assert (found["machine"]["gpus"], found["job"]["lora"], found["resident"]) == (1, 6, "slots")
    edit_project(tiny, "max_num_seqs: 4", 'gpu_memory_utilization: "0.5"')
    assert "`gpu_memory_utilization` is a number above 0 and at most 1, not '0.5'" in cli("doctor", "--for", "sft").err


# Of the 7B, the 8B and the 13B in bfloat16.
BYTES = {"seven": 2 * 6_738_415_616, "eight": 2 * 8_030_261_248, "more": 2 * 13_015_864_320}


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        # Half of 79.5 GiB, less 2 to work: 24.2 of the largest and 12.6 fit, 15.0 more do not.
        ("", {"reward seven": BYTES["seven"], "rewards that take turns": BYTES["more"]}),
        ("reward_memory: 60GiB", {f"reward {name}": size for name, size in BYTES.items()}),
        ("reward_memory: 30GiB", {"rewards that take turns": BYTES["more"]}),
        ("reward_memory: 20GiB", None),
    ],
)
def test_large_reward_models_take_turns(tiny, cli, budget, expected):
    # Sizes stand for the models.
    models = {"seven": "7B", "eight": "8B", "more": "13B", "far": "8B, device: 'cuda:1'", "slow": "8B, device: cpu"}
    rewards = "".join(f"  {name}: {{model: {model}, dtype: bfloat16}}\n" for name, model in models.items())
    edit_project(tiny, "rewards:", f"{budget}\nrewards:\n{rewards.rstrip()}")
    answer = cli("doctor", "--for", "sft", "--gpu-memory", "80", "--json")
    if expected is None:
        assert answer.code == 1 and "too small for those that must be there at once" in answer.err
    else:
        assert json.loads(answer.out)["job"]["rewards"] == expected


def test_reward_models_in_vllm_hold_what_they_compute_in(tiny, cli):
    text, vllm = "max_tokens: 1000, dtype: bfloat16", "backend: vllm, dtype: bfloat16"
    models = {
        "seven": f"model: 7B, {text}",
        "fast": f"model: 7B, {vllm}",
        "judge": f"judge: 8B, token: A, template: chat, {vllm}",
    }
    edit_project(tiny, "rewards:", "rewards:\n" + "\n".join(f"  {name}: {{{one}}}" for name, one in models.items()))
    found = json.loads(cli("doctor", "--for", "sft", "--gpu-memory", "160", "--json").out)["job"]["rewards"]
    # Keys and values of 8,192 tokens; a batch of as many; and logits of 256 sequences to sample from.
    cache = {"seven": 2 * 32 * 4096 * 2 * 8192, "eight": 2 * 32 * 1024 * 2 * 8192}
    batch = {"seven": 8192 * (3 * 11_008 + 6 * 4096) * 2, "eight": 8192 * (3 * 14_336 + 6 * 4096) * 2}
    assert found == {
        "reward seven": BYTES["seven"],
        "reward fast": BYTES["seven"] + cache["seven"] + max(2 * GIB, GIB + batch["seven"]),
        "reward judge": BYTES["eight"] + cache["eight"] + max(2 * GIB, GIB + batch["eight"] + 256 * 128_256 * 20),
    }


@pytest.mark.parametrize("given", [("--gpus", "2"), ("--lora", "8"), ("--for", "7B", "--thorough")])
def test_a_plan_and_a_check_do_not_mix(cli, given):
    answer = cli("doctor", *given)
    assert answer.code == 1 and "do not mix" in answer.err


def test_the_project_says_how_long_sequences_are(tiny, cli, monkeypatch):
    monkeypatch.setattr(planned_work, "graphics_cards", lambda: ["NVIDIA H100 80GB HBM3, 81559 MiB"])
    edit_project(tiny, "letters:", "tiny: {model: first}\n  letters:")
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

"""A merged adapter in vLLM: greedy text equal to that of PEFT."""

import gc

import pytest
import torch
from tiny_adapters import load_adapter, save_adapter
from tiny_models import PROMPTS
from transformers import AutoTokenizer

from rewarded_lines import merge

TOKENS = 12


def expected(base, folder, prompts):
    """Return the greedy continuation by PEFT."""
    model = load_adapter(base, folder)
    answers = []
    for ids in prompts:
        with torch.no_grad():
            found = model.generate(torch.tensor([ids]), max_new_tokens=TOKENS, do_sample=False, num_beams=1)
        answers.append(found[0, len(ids) :].tolist())
    return answers


@pytest.mark.slow
def test_vllm_and_peft_read_merged_adapters_alike(tiny, monkeypatch):
    """Two λ, an output with ranks that differ, and a repeated policy, in one engine."""
    vllm = pytest.importorskip("vllm", reason="vLLM is not installed in this environment")
    from vllm.lora.request import LoRARequest

    settings = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    save_adapter(tiny / "sft", tiny / "one", 1, r=4, lora_alpha=16)
    save_adapter(
        tiny / "sft", tiny / "two", 2, r=6, lora_alpha=9, use_rslora=True, target_modules=["q_proj", "up_proj"]
    )
    outputs = [result.out for result in merge("sft", ["one", "two"], ["0.3", "0.8", "1.0"], beta=0.5, out="out")]
    outputs += [result.out for result in merge("sft", ["one", "two"], [1.0, "0.0"], beta=0, out="ends")]
    tokenizer = AutoTokenizer.from_pretrained("sft")
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    engine = vllm.LLM(
        "sft", enable_lora=True, max_lora_rank=16, max_loras=2, enforce_eager=True, dtype="float32", max_model_len=64
    )
    try:
        sampling = vllm.SamplingParams(temperature=0, max_tokens=TOKENS)
        tokens = [{"prompt_token_ids": ids} for ids in prompts]
        texts = []
        for index, folder in enumerate(outputs, start=1):
            request = LoRARequest(folder.name, index, str(folder))
            found = engine.generate(tokens, sampling, lora_request=request, use_tqdm=False)
            texts.append([list(answer.outputs[0].token_ids) for answer in found])
            assert texts[-1] == expected(tiny / "sft", folder, prompts)
        assert len(set(map(str, texts))) == len(outputs)
    finally:
        engine.llm_engine.engine_core.shutdown()
        del engine
        gc.collect()

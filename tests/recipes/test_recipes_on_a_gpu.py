"""The first steps of every recipe on a card, whole and with LoRA, in the type that the card is made for."""

from __future__ import annotations

import json
import math

import pytest
from safetensors.torch import load_file
from small_recipes import POLICIES, record, run

pytestmark = pytest.mark.gpu

# PPO's first step is one of its updates.
STEPS = {"ppo": {"total_episodes": 16}, **dict.fromkeys(("sft", "reward", "rloo", "grpo", "dpo"), {"max_steps": 2})}

WHOLE = [("sft", False), ("ppo", False)]


@pytest.mark.parametrize(("name", "lora"), [*((name, True) for name in STEPS if name != "sft"), *WHOLE])
def test_first_steps(name, lora, device, work, monkeypatch):
    monkeypatch.chdir(work)
    precise = {"dtype": "bfloat16", "bf16": True} if device == "cuda" else {}
    peft = {"use_peft": True, "lora_r": 4} if lora else {}
    out = work / "out"
    run(name, work, output_dir=out, logging_steps=1, **STEPS[name], **precise, **peft)
    # SFT and reward models are whole in the end: LoRA weights are folded in.
    (weights,) = out.glob("adapter_model.safetensors" if lora and name in POLICIES else "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in load_file(weights).values())
    entries = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [value for entry in entries for key, value in entry.items() if "loss" in key]
    assert losses and all(map(math.isfinite, losses))
    assert (name in POLICIES) == ("gain" in json.dumps(record(out)))

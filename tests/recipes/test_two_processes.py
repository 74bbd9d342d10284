"""Two processes over gloo: each recipe trains, evaluates and saves a checkpoint that loads, with LoRA and without."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import debug_launcher
from peft import AutoPeftModelForCausalLM
from small_recipes import ROOT, load_recipe, make_project, record, run, run_as_one_of_two
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

RECIPES = ("sft", "reward", "ppo", "dpo", "rloo", "grpo")
NAMES = [f"{recipe}-{kind}" for recipe in RECIPES for kind in ("full", "lora")]
pytestmark = pytest.mark.slow
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "recipes/accelerate/cpu.yaml"]


def launch(folder):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [*LAUNCH, str(Path(__file__).with_name("two_processes.py")), str(folder), *NAMES]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=220)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "TRL currently supports vLLM" not in done.stderr and "Triton is installed" not in done.stderr


def fork(folder):
    """Do as `accelerate launch` does, with processes that have the imports of this one."""
    if torch.cuda.is_initialized():
        pytest.skip("a fork cannot use the GPU that this process uses")
    for recipe in RECIPES:
        load_recipe(recipe)
    debug_launcher(run_as_one_of_two, (folder, NAMES), num_processes=2)


@pytest.fixture(scope="module", params=[fork, launch])
def two(request, tmp_path_factory):
    """The project after both processes have run every recipe."""
    folder = make_project(tmp_path_factory.mktemp("two"))
    request.param(folder)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_it_trains_measures_and_saves(two, name):
    folder = two / name
    recipe, _, kind = name.partition("-")
    assert record(folder)["complete"] and not folder.with_name(f"{name}.unfinished").exists()
    reward, policy_lora = recipe == "reward", kind == "lora" and recipe in ("ppo", "dpo", "rloo", "grpo")
    auto = AutoModelForSequenceClassification if reward else AutoModelForCausalLM
    # PPO takes four steps of the optimizer in each of its four updates.
    last = 16 if recipe == "ppo" else 4
    for place in (folder, folder / f"checkpoint-{last}"):
        adapter = (place / "adapter_config.json").is_file()
        assert adapter == (policy_lora or (kind == "lora" and place != folder))
        if not adapter:
            _, loading = auto.from_pretrained(place, output_loading_info=True)
            assert not loading["missing_keys"] and not loading["unexpected_keys"]
        elif not reward:
            AutoPeftModelForCausalLM.from_pretrained(place)
    metrics = record(folder)["metrics"]
    assert {"sft": "validation_perplexity", "reward": "accuracy"}.get(recipe, "gain") in metrics
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == lines[-1]["max_steps"] == last


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_effective_batch_is_the_one_declared(two, recipe):
    config = next(part for name, part in record(two / f"{recipe}-full")["config"].items() if "output_dir" in part)
    assert config["per_device_train_batch_size"] == 4 and config["gradient_accumulation_steps"] == 1
    if recipe == "ppo":
        episodes = [json.loads(line).get("episode") for line in (two / "ppo-full/metrics.jsonl").open()]
        assert [count for count in episodes if count][:4] == [8, 16, 24, 32]


def test_two_processes_learn_what_one_does(two, work):
    same = {"effective_batch_size": 8, "per_device_train_batch_size": 8, "train_sampling_strategy": "sequential"}
    run("sft", work, output_dir=work / "one", **same)
    one, both = (record(folder)["metrics"] for folder in (work / "one", two / "sft-full"))
    for name in ("train_loss", "validation_perplexity"):
        assert both[name] == pytest.approx(one[name], rel=0.01)

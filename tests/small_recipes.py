"""The recipes in miniature: run in this process on their demo configs, in a project with a tiny SFT model."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import runpy
import sys
from collections.abc import Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
import yaml
from accelerate.state import AcceleratorState
from command import speak_to
from tiny_models import make_model, save_model
from transformers import GenerationMixin

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "recipes" / "configs" / "demo"
GOOD = ["a warm and funny film about a small town", "one of the best films of the year so far"]
BAD = ["a dull and lifeless film about very little", "one of the worst films of the year by far"]
PROJECT = """\
# What the user wrote stays.
base: sft
rewards:
  detailed: {function: rewards.py:detailed, unit: words}  # a function
  vowels: {function: rewards.py:vowels}
  constant: {function: rewards.py:constant}
  failing: {function: rewards.py:failing}
"""
REWARDS = """\
CALLS, LEFT = [], 3


def detailed(prompts, responses):
    return [float(len(response.split())) for response in responses]


def vowels(prompts, responses):
    return [sum(letter in "aeiou" for letter in response) / (1 + len(response)) for response in responses]


def constant(prompts, responses):
    return [1.0] * len(prompts)


def failing(prompts, responses):
    CALLS.append(1)
    if len(CALLS) > LEFT:
        raise RuntimeError("no more")
    return vowels(prompts, responses)
"""
# What makes a run on the demo configs small.
SMALL = {
    "sft": {"per_device_train_batch_size": 8, "max_steps": 4},
    "reward": {"per_device_train_batch_size": 8, "max_steps": 4},
    "ppo": {
        "total_episodes": 32,
        "effective_batch_size": 8,
        "per_device_train_batch_size": 8,
        "local_rollout_forward_batch_size": 8,
        "num_ppo_epochs": 2,
        "num_mini_batches": 2,
        "response_length": 6,
        "validation_limit": 8,
        "reward": "vowels",
    },
    "rloo": {
        "max_steps": 4,
        "effective_batch_size": 8,
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 6,
        "validation_limit": 8,
        "reward": "vowels",
    },
    "grpo": {
        "max_steps": 4,
        "effective_batch_size": 8,
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 6,
        "validation_limit": 8,
        "reward": "vowels",
    },
    "dpo": {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "train_limit": 16,
        "responses": 4,
        "margin": 0.1,
        "max_response_tokens": 6,
        "validation_limit": 8,
        "reward": "vowels",
        "sampling_engine": "hf",
    },
}
POLICIES = ("ppo", "rloo", "grpo", "dpo")


def load_recipe(name: str):
    """Import a recipe as the script it is."""
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", ROOT / "recipes" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up by name.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def words_for(name: str, folder: Path, **overrides: object) -> list[str]:
    """Return the command line that runs a recipe small, with every path of its demo config in `folder`."""
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    moved = {
        key: value.replace("runs/demo", str(folder))
        for key, value in config.items()
        if isinstance(value, str) and value.startswith("runs/demo")
    }
    start = {"model_name_or_path": folder / "sft"} if name in ("sft", "reward") else {}
    options = moved | start | {"disable_tqdm": True} | SMALL[name] | overrides
    words = [f"--{key}={str(value).lower() if value is True else value}" for key, value in options.items()]
    return ["--config", str(CONFIGS / f"{name}.yaml"), *words]


def run(name: str, folder: Path, **overrides: object) -> None:
    """Run a recipe in this process."""
    load_recipe(name).main(words_for(name, folder, **overrides))


def run_as_one_of_two(folder: Path, names: Sequence[str]) -> None:
    """Run recipes, with LoRA where a name ends in -lora, as one of two processes; checkpoints after every two steps."""
    # A fork has the state of its parent, which was alone.
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.set_num_threads(1)
    for name in names:
        recipe, _, kind = name.partition("-")
        # The batch over both processes is the one that a single process has in the other tests.
        more = {"effective_batch_size": 8, "per_device_train_batch_size": 4}
        more |= {"use_peft": True} if kind == "lora" else {}
        if recipe == "sft":
            # Every eight rows are one batch, however many processes share it.
            more["train_sampling_strategy"] = "sequential"
        run(recipe, folder, output_dir=folder / name, save_strategy="steps", save_steps=2, **more)


def start(name: str, words: list[str], log: Path) -> BaseProcess:
    """Start a recipe as a program, in a child that need not import torch and TRL again.

    Args:
        name: of the recipe.
        words: its arguments.
        log: the file that gets what it prints.
    """
    # A fork has the imports of this process; it cannot use a GPU that this process uses.
    context = multiprocessing.get_context("spawn" if torch.cuda.is_initialized() else "fork")
    child = context.Process(target=_be_program, args=(name, words, log))
    child.start()
    return child


def _be_program(name: str, words: list[str], log: Path) -> None:
    speak_to(log)
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.argv = [f"{name}.py", *words]
    runpy.run_path(str(ROOT / "recipes" / f"{name}.py"), run_name="__main__")


def record(folder: Path) -> dict:
    """Return what a run recorded."""
    return json.loads((folder / "training.json").read_text())


def make_project(folder: Path) -> Path:
    """Write the project: an SFT model, data, rewards and the file that names them."""
    save_model(make_model(0, blocks=2), folder / "sft")
    rows = [
        {"prompt": " ".join(text.split()[:3]), "completion": text[len(" ".join(text.split()[:3])) :]}
        for text in (GOOD + BAD) * 16
    ]
    pairs = [{"prompt": "", "chosen": good, "rejected": bad} for good in GOOD for bad in BAD] * 16
    whole = [{"chosen": "this is " + row["chosen"], "rejected": "this is " + row["rejected"]} for row in pairs]
    contents = {"train": rows, "validation": rows, "pairs-train": pairs, "pairs-test": pairs, "pairs-whole": whole}
    (folder / "data").mkdir()
    for name, content in contents.items():
        (folder / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    (folder / "rewarded-lines.yaml").write_text(PROJECT)
    (folder / "rewards.py").write_text(REWARDS)
    return folder


@contextmanager
def prompts_of_generation():
    """Keep the prompts, without padding, of everything that transformers generates."""
    kept, own = [], GenerationMixin.generate

    def generate(self, *args, **options):
        ids = options.get("input_ids", args[0] if args else None)
        kept.extend(row[mask.bool()].tolist() for row, mask in zip(ids, options["attention_mask"], strict=True))
        return own(self, *args, **options)

    GenerationMixin.generate = generate
    try:
        yield kept
    finally:
        GenerationMixin.generate = own

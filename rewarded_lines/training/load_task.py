"""Loads a policy's task from project, rewards, tokenizer and data, and refuses mismatches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import blake3
from transformers import TrainingArguments
from trl import ModelConfig

from rewarded_lines.config import decides
from rewarded_lines.data.chat_templates import check_template
from rewarded_lines.data.dataset_formats import read_pairs, read_prompts
from rewarded_lines.data.prompts import Prompt
from rewarded_lines.data.rows import Row, rows_hash
from rewarded_lines.engines.responses import ResponseReader, prompts_told
from rewarded_lines.engines.tokenizers import end_tokens, load_generation_config, set_template
from rewarded_lines.errors import fail
from rewarded_lines.projects import PROJECT_FILE, Project, load_project
from rewarded_lines.rewards.reward import check_columns, deciding
from rewarded_lines.training.generation_config import generation_inputs
from rewarded_lines.training.load_models import absolute, check_start, load_tokenizer, lora_config
from rewarded_lines.training.moving_reference import check_reference
from rewarded_lines.training.policy_task import PolicyTask
from rewarded_lines.training.recipe_options import DataOptions, RewardOptions, RunOptions
from rewarded_lines.training.register_model import register
from rewarded_lines.training.training_record import reference_hash
from rewarded_lines.training.training_reward import load_training_reward
from rewarded_lines.training.training_run import from_main, say

# Settings of a trainer's `generation_kwargs` that the trainer or the project has a key for.
_NO_GENERATION_KWARGS = {
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_new_tokens", "max_tokens", "eos_token_id",
    "stop_token_ids", "stop", "stop_strings",
}  # fmt: skip


def load_task(
    options: RunOptions,
    data: DataOptions,
    rewards: RewardOptions,
    model_options: ModelConfig,
    training: TrainingArguments,
    pairs: bool = False,
) -> PolicyTask:
    """Return a policy's task; no policy is loaded yet. `pairs` reads the training rows as pairs."""
    weights = rewards.weights()
    project = _project(options, model_options)
    project.require("rewards")
    base = _base(project, model_options)
    _check_options(training, project)
    check_reference(training, bool(model_options.use_peft))
    # Its faults are told before anything is measured.
    lora_config(model_options)
    _check_vllm(training, model_options)
    validation = data.validation()
    if validation is None:
        raise fail("no validation data", where="validation_file", expected="prompts to measure the policy on")
    rows: list[Row]
    if pairs:
        rows = read_pairs(data.train(), tell=say)
    else:
        rows = read_prompts(data.train(), tell=say)
    measured = read_prompts(validation, tell=say)
    _check_one_kind(rows[0]["prompt"], measured[0]["prompt"], validation.file or str(validation.dataset))
    reward = load_training_reward(project, weights, str(training.device))
    check_columns(reward.rewards.values(), {**({} if pairs else {"training rows": rows}), "validation rows": measured})
    inputs = {
        "train": rows_hash(deciding(rows)),
        "validation": rows_hash(deciding(measured)),
        "base": reference_hash(base),
        "reward": reward.fingerprint,
        **generation_inputs(project.generation),
    }
    declared = {name: decides(project.config.rewards[name]) for name in reward.rewards}
    inputs["declarations"] = blake3.blake3(json.dumps(declared, sort_keys=True).encode()).hexdigest()
    if any(one.reads_columns for one in reward.rewards.values()):
        inputs["columns"] = rows_hash(deciding([*rows, *measured], reward.rewards.values()))
    tokenizer = load_tokenizer(base)
    set_template(tokenizer, project.generation)
    reader = _reader(base, tokenizer, project, training)
    task = PolicyTask(
        base, tokenizer, reader, project.generation, reward, rows, measured, inputs, options,
        data, rewards, len(rows),
    )  # fmt: skip
    _check_readable(task)
    return task


def _project(options: RunOptions, model_options: ModelConfig) -> Project:
    """Return the project; `model_name_or_path` becomes its base if it has none."""
    path = options.project_file
    if not Path(path).is_file():
        raise fail(
            "no project file there",
            where=path,
            expected=f"a {PROJECT_FILE} that declares the rewards",
            remedy="copy a suite of eval/suites there, or name one with `project_file`",
        )
    project = load_project(path)
    name = model_options.model_name_or_path
    if project.config.base is None and name:
        value: Any = Path(name) if Path(name).is_dir() else name
        from_main(lambda: say(*register(path, {("base",): value})))
        project = load_project(path)
    return project


def _base(project: Project, model_options: ModelConfig) -> str:
    path = str(project.path)
    if project.config.base is None:
        raise fail(
            "`base` is missing",
            where=path,
            expected="the SFT model that policies start from",
            remedy="train it with recipes/sft.py, or name one with `model_name_or_path`",
        )
    if model_options.model_revision != "main":
        what = "a project's base has no revision, so the merger would read another one"
        raise fail(what, where="model_revision", remedy="download that revision and name its folder as `base`")
    base = absolute(project.resolve(project.config.base))
    check_start(base, model_options, path)
    return base


def _check_options(training: Any, project: Project) -> None:
    """Refuse settings that the trainer would use, but measuring and sweeps would not, or that the project decides."""
    for name in set(getattr(training, "generation_kwargs", None) or {}) & _NO_GENERATION_KWARGS:
        raise fail(
            f"`{name}` would reach training only",
            where="generation_kwargs",
            expected="settings that the trainer has no key for",
            remedy="set the trainer's own key; for the end of responses, `generation:` in the project",
        )
    if getattr(training, "mask_truncated_completions", False) and project.generation.stop:
        raise fail(
            "the trainer takes a response that ends at a stop text for a truncated one",
            where="mask_truncated_completions",
            remedy="set it to false, or leave `stop:` out of the project's `generation:`",
        )
    if getattr(training, "reward_weights", None) is not None:
        raise fail(
            "rewards have their weights beside their names",
            where="reward_weights",
            expected="`rewards: {NAME: WEIGHT, ...}`",
            got=str(training.reward_weights),
        )
    given, declared = getattr(training, "chat_template_kwargs", None), project.config.generation.chat_template_kwargs
    if given and dict(given) != dict(declared):
        raise fail(
            "the variables of the chat template would reach training only",
            where="chat_template_kwargs",
            expected=f"those of the project: {declared or 'none'}",
            got=str(dict(given)),
            remedy=f"declare them in {project.path}, where sweeps find them, too: "
            f"`generation: {{chat_template_kwargs: {dict(given)}}}`",
        )


def _check_vllm(training: Any, model_options: ModelConfig) -> None:
    """Refuse vLLM inside the trainer where its weights would not be the policy's."""
    if not getattr(training, "use_vllm", False):
        return
    if model_options.load_in_4bit or model_options.load_in_8bit:
        raise fail(
            "for vLLM, TRL folds the adapter into the quantized weights and takes it out again: each time they are "
            "rounded anew, so the base would change",
            where="use_vllm",
            remedy="leave `use_vllm` out, or `load_in_4bit` and `load_in_8bit`",
        )
    if training.vllm_mode == "colocate" and training.device.type == "cpu":
        raise fail(
            "TRL cannot load weights into vLLM on a CPU",
            where="use_vllm",
            expected="a GPU, or `vllm_mode: server`",
            remedy="leave `use_vllm` out",
        )


def _check_one_kind(trained: Prompt, measured: Prompt, where: str) -> None:
    if isinstance(trained, list) != isinstance(measured, list):
        kinds = ["chats" if isinstance(one, list) else "texts" for one in (trained, measured)]
        raise fail(
            "training rows and validation prompts have different forms: the policy would be measured on another form",
            where=where,
            expected=f"{kinds[0]}, as in training",
            got=kinds[1],
            remedy="set `chat: true`, which turns texts into chats, or name validation rows of the same form",
        )


def _reader(base: str, tokenizer: Any, project: Project, training: Any) -> ResponseReader:
    """Return the reader of responses; refuse no end token, or one for training only."""
    reader = ResponseReader.of(tokenizer, end_tokens(tokenizer, load_generation_config(base)), project.generation)
    if not reader.ends:
        raise fail(
            "the model has no token that ends a response",
            where=base,
            expected="an end token in its generation config or its tokenizer",
            remedy="declare one in the project: `generation: {stop_token_ids: [ID]}`",
        )
    stop = getattr(training, "stop_token_id", None)
    if stop is not None and stop not in reader.ends:
        raise fail(
            "a token that would end responses in training only",
            where="stop_token_id",
            got=str(stop),
            remedy=f"declare it in the project: `generation: {{stop_token_ids: [{stop}]}}`",
        )
    return reader


def _check_readable(task: PolicyTask) -> None:
    """Refuse chats that template or reward cannot read whole; print what a reward ignores."""
    prompts: list[Any] = [*task.train_prompts, *task.prompts]
    if task.chats:
        whole = [row["prompt"] + row[side] for row in task.rows for side in ("chosen", "rejected") if side in row]
        check_template(task.tokenizer, [*whole, *prompts], "training and validation rows")
    notes = [one.check(prompts) for one in task.reward.rewards.values()]
    say(*filter(None, [prompts_told(task.tokenizer, task.prompts, task.generation), *notes]))

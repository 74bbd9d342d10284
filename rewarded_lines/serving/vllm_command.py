"""The command that starts vLLM's server for a project: its options and its environment."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rewarded_lines.engine_settings import EngineSettings
from rewarded_lines.engines.adapter_folders import adapted_layers, adapter_bytes
from rewarded_lines.engines.vllm_adapters import refuse_unserved, slot_rank
from rewarded_lines.engines.vllm_arguments import INVARIANT
from rewarded_lines.engines.vllm_memory import adapters_at_once, memory_share
from rewarded_lines.engines.vllm_process import vllm_device
from rewarded_lines.engines.vllm_versions import finds_compiler
from rewarded_lines.evaluator.recorded_choices import DEFAULT
from rewarded_lines.merger.adapter_plan import AdapterPlan
from rewarded_lines.merger.plan import Plan
from rewarded_lines.processes import VLLM_SETTINGS, available_memory
from rewarded_lines.projects import Project

_MIDDLEWARE = "rewarded_lines.serving.middleware.PreferenceMiddleware"
# By name: a worker may be another process.
_WORKER = "rewarded_lines.engines.vllm_models.MergingWorker"


def server_options(project: Project, plan: Plan, settings: EngineSettings, beside: int) -> dict[str, Any]:
    """Return the options of `vllm serve`; those of the user's settings come last.

    Args:
        project: its `generation:` has dtype and chat template.
        plan: of adapters, or of whole models.
        settings: of the engine.
        beside: bytes of a GPU that base and policies take beside the engine.

    Raises:
        UserError: vLLM serves no such adapters, or a GPU has no memory left.
    """
    spec = project.generation
    options: dict[str, Any] = {"dtype": spec.dtype, "middleware": [_MIDDLEWARE], "allowed_origins": []}
    if spec.chat_template:
        options["chat_template"] = spec.chat_template
    if spec.chat_template_kwargs:
        options["default_chat_template_kwargs"] = dict(spec.chat_template_kwargs)
    if plan.carried.changed:
        folder = str(plan.text_folder)
        options |= {"tokenizer": folder, "generation_config": folder}
    if vllm_device() == "cpu":
        # As in a sweep: short blocks share prompts, and a prompt in two batches would lose its seed.
        options |= {"enforce_eager": True, "block_size": 32, "enable_chunked_prefill": False}
    elif not finds_compiler():
        options["enforce_eager"] = True
    if isinstance(plan, AdapterPlan):
        options |= {"served_model_name": [Path(plan.reference).name], **_adapter_options(plan)}
    else:
        options |= {"served_model_name": [DEFAULT], "worker_extension_cls": _WORKER}
        if beside and vllm_device() == "cuda" and "gpu_memory_utilization" not in settings.args:
            options["gpu_memory_utilization"] = memory_share(0, 0, beside, settings.tensor_parallel)
    return options | settings.args


def _adapter_options(plan: AdapterPlan) -> dict[str, Any]:
    refuse_unserved(plan, "rewarded-lines serve")
    rank = slot_rank(plan, "rewarded-lines serve")
    slots = adapters_at_once(available_memory(vllm_device()), adapter_bytes(plan, rank))
    layers = {"lora_target_modules": adapted_layers(plan)}
    return {"enable_lora": True, "max_lora_rank": rank, "max_loras": slots, "max_cpu_loras": slots, **layers}


def arguments(options: Mapping[str, Any]) -> list[str]:
    """Return options as words of a command line."""
    words = []
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if value is True or value is False:
            words.append(flag if value else f"--no-{flag[2:]}")
        elif isinstance(value, Sequence) and not isinstance(value, str) and value:
            words += [flag, *map(str, value)]
        elif value is not None:
            words += [flag, value if isinstance(value, str) else json.dumps(value)]
    return words


def server_command(model: str, options: Mapping[str, Any]) -> list[str]:
    """Return the command; -P: a `torch.py` in the current folder is not torch.

    The command `vllm` does the same, but builds for CPUs do not have it: they are a package of another name.
    """
    quiet = ["-W", "ignore::DeprecationWarning", "-W", "ignore::FutureWarning"]
    python = [sys.executable, "-P", *quiet, "-m", "vllm.entrypoints.openai.api_server"]
    return [*python, "--model", model, *arguments(options)]


def environment(settings: EngineSettings, own: Mapping[str, str | None]) -> dict[str, str]:
    """Return the environment of the server: the user's, `own`, and what vLLM needs."""
    usual = {name: value for name, value in VLLM_SETTINGS.items() if name != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    # Standard output is for the address.
    usual |= {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_LOGGING_STREAM": "ext://sys.stderr"}
    if vllm_device() == "cpu":
        # torch would compile a small function: that takes seconds, and needs a C++ compiler.
        usual["TORCH_COMPILE_DISABLE"] = "1"
    if settings.attention == "batch-invariant":
        usual[INVARIANT] = "1"
    return {**usual, **os.environ, **{name: value for name, value in own.items() if value is not None}}

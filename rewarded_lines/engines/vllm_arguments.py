"""Checks of the user's settings for vLLM, before it is imported: unknown arguments, and those that do not fit the work.

vLLM's source names its arguments. It is read, not run: to import vLLM takes ten seconds.
"""

from __future__ import annotations

import ast
import os
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rewarded_lines.engine_settings import EngineSettings, own_reason
from rewarded_lines.engines.vllm_process import check_gpu, vllm_device
from rewarded_lines.errors import Problem, UserError, did_you_mean, fail
from rewarded_lines.merger.plan import Plan
from rewarded_lines.versions import build_of, installed

WHERE = "`engine:` or --engine-arg"
# vLLM quantizes with these while it loads, so also the weights of a merge. The others need a quantized checkpoint.
_ONLINE = ("fp8_per_tensor", "fp8_per_block", "fp8_per_channel", "mxfp8", "int8_per_channel_weight_only", "online")
# The variable with which vLLM's modules choose their kernels, at their import.
INVARIANT = "VLLM_BATCH_INVARIANT"
# The least compute capability that vLLM's batch-invariant kernels are for.
_CAPABILITY = (8, 0)


def check_names(settings: EngineSettings) -> None:
    """Refuse arguments that the installed vLLM does not have, all at once, with the nearest name."""
    if not settings.args:
        return
    known = argument_names()
    usable = [*EngineSettings.model_fields, *(name for name in known if not own_reason(name))]
    unknown = [name for name in settings.args if name not in known]
    what = f"vLLM {vllm_version()} has no argument"
    remedy = "leave it out; `vllm serve --help=all` lists the arguments"
    if unknown:
        raise UserError(
            Problem(f"{what} `{name}`", where=WHERE, remedy=did_you_mean(name, usable, remedy)) for name in unknown
        )


def check_work(settings: EngineSettings, plan: Plan | None) -> None:
    """Refuse settings with which whole merged models cannot be put into the running engine."""
    if plan is None or plan.kind == "adapter":
        return
    method = settings.args.get("quantization")
    if method is not None and method not in _ONLINE:
        raise fail(
            f"vLLM cannot quantize merged weights in the running engine with `{method}`",
            where=f"{WHERE}: quantization",
            expected="one of " + ", ".join(_ONLINE),
            got=str(method),
            remedy="take one of these, leave it out, or sweep LoRA policies, whose base stays in the engine",
        )
    if offload := [name for name in settings.args if name.startswith(("cpu_offload_", "offload_"))]:
        raise fail(
            "vLLM cannot replace weights that it keeps in the host's memory",
            where=f"{WHERE}: {', '.join(offload)}",
            got="a sweep of whole models",
            remedy="spread the model with `tensor_parallel_size`, or sweep LoRA policies",
        )


def check_length(settings: EngineSettings, longest: int) -> None:
    """Refuse an engine that is too short for a sequence of `longest` tokens."""
    most = settings.args.get("max_model_len")
    if isinstance(most, int) and 0 < most < longest:
        raise fail(
            "the engine would be too short for the longest prompt with its response",
            where=f"{WHERE}: max_model_len",
            expected=f"at least {longest}",
            got=str(most),
            remedy="leave it out, or shorten the prompts, the control texts or generation.max_tokens",
        )


def check_device(settings: EngineSettings) -> None:
    """Refuse settings that this machine's device cannot serve."""
    import torch

    check_gpu("--engine vllm")
    if vllm_device() == "cuda":
        capability = torch.cuda.get_device_capability()
    else:
        capability = (0, 0)
        _check_cpu(settings.args)
    if settings.attention == "batch-invariant" and capability < _CAPABILITY:
        least = ".".join(map(str, _CAPABILITY))
        by_variable = os.environ.get(INVARIANT) == "1"
        raise fail(
            "vLLM's batch-invariant kernels do not run here",
            where=f"the variable {INVARIANT}" if by_variable else f"{WHERE}: attention",
            expected=f"an NVIDIA GPU of compute capability {least} or more",
            got=f"one of {'.'.join(map(str, capability))}" if any(capability) else "a CPU",
            remedy=f"unset {INVARIANT}" if by_variable else "leave it out",
        )


def choose_kernels(settings: EngineSettings) -> None:
    """Choose batch-invariant kernels if the settings ask for them. vLLM's modules read this at their import.

    Raises:
        UserError: vLLM was imported before, with other kernels.
    """
    if settings.attention != "batch-invariant" or os.environ.get(INVARIANT) == "1":
        return
    if "vllm" in sys.modules:
        what = "vLLM was loaded in this process with kernels that are not batch-invariant"
        raise fail(what, where=f"{WHERE}: attention", remedy=f"start Python anew with {INVARIANT}=1")
    os.environ[INVARIANT] = "1"


def _check_cpu(args: dict[str, Any]) -> None:
    for name, usable, why in (
        ("enforce_eager", True, "CUDA graphs are for a GPU"),
        ("enable_chunked_prefill", False, "on a CPU no prompt is split between batches, or its seed is lost"),
    ):
        if args.get(name, usable) != usable:
            raise fail(why, where=f"{WHERE}: {name}", got=str(args[name]), remedy="leave it out on a CPU")


@cache
def argument_names() -> tuple[str, ...]:
    """Return the arguments of the installed vLLM: the public fields of its class `EngineArgs`."""
    source = vllm_folder() / "engine" / "arg_utils.py"
    tree = ast.parse(source.read_text(encoding="utf-8"))
    fields = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "EngineArgs")
    names = (one.target.id for one in fields if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name))
    return tuple(name for name in names if not name.startswith("_"))


def vllm_folder() -> Path:
    """Return the folder of the installed vLLM's code."""
    found = find_spec("vllm")
    assert found is not None, "the engine was checked before"
    return Path(str(found.origin)).parent


def vllm_version() -> str:
    """Return the version of the installed vLLM, a CPU build or not."""
    return installed(build_of("vllm"))

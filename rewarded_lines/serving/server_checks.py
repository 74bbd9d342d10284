"""What is checked before vLLM starts, which takes a minute: the port, memory, arguments, the run's policies."""

from __future__ import annotations

import ast
import os
import socket
from collections.abc import Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from rewarded_lines.checkpoints.dtypes import FLOATS
from rewarded_lines.checkpoints.hashing import model_hash, policy_hash
from rewarded_lines.engine_settings import EngineSettings
from rewarded_lines.engines.memory_levels import least_engine
from rewarded_lines.engines.vllm_arguments import argument_names, vllm_folder, vllm_version
from rewarded_lines.engines.vllm_process import vllm_device
from rewarded_lines.errors import Problem, UserError, did_you_mean, fail
from rewarded_lines.merger.plan import Plan
from rewarded_lines.processes import GIB, VLLM_SETTINGS, available_memory

_WHERE = "`engine:` or --engine-arg"
# Python, torch and vLLM in the processes of a server on a CPU.
_PROCESSES = 2 * GIB
_ADAPTERS = "the project's policies are the adapters"
# Arguments of vLLM's server that this command sets by itself, with what to write instead.
_OWN = {
    **{name: f"write --{name.replace('_', '-')}" for name in ("host", "port", "api_key")},
    **dict.fromkeys(("lora_modules", "default_mm_loras"), _ADAPTERS),
    **dict.fromkeys(("middleware", "root_path", "uds", "grpc_port", "headless"), "the page and its answers need it"),
    **dict.fromkeys(("api_server_count", "data_parallel_supervisor_port"), "one process knows which weights answer"),
    **dict.fromkeys(("chat_template", "default_chat_template_kwargs"), "write it in `generation:`"),
    "served_model_name": "the base's name, and `default`",
    "config": "write `engine:` in the project file",
}
_PLUGIN = "rewarded_lines"
# The file with the arguments of vLLM's server, in this and in earlier versions.
_FRONTENDS = ("entrypoints/launchers/cli_args.py", "entrypoints/openai/cli_args.py")


def check_arguments(settings: EngineSettings) -> None:
    """Refuse arguments that the installed `vllm serve` does not have, or that this command sets; all at once."""
    known = {*argument_names(), *_frontend_names()}
    problems = []
    for name in settings.args:
        if name in _OWN:
            problems.append(Problem(f"`{name}` is not for you to set: {_OWN[name]}", _WHERE))
        elif name not in known:
            remedy = did_you_mean(name, sorted(known - _OWN.keys()), "`vllm serve --help=all` lists the arguments")
            problems.append(Problem(f"vLLM {vllm_version()} has no argument `{name}`", _WHERE, remedy=remedy))
    if problems:
        raise UserError(problems)


def _frontend_names() -> set[str]:
    source = next(path for name in _FRONTENDS if (path := vllm_folder() / name).is_file())
    tree = ast.parse(source.read_text(encoding="utf-8"))
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name.endswith("FrontendArgs")]
    fields = [one.target for node in classes for one in node.body if isinstance(one, ast.AnnAssign)]
    return {field.id for field in fields if isinstance(field, ast.Name)} | _OWN.keys()


def check_plugin() -> None:
    """Refuse a vLLM that would not load this package's plugin, which merges adapters and ends workers."""
    found = {one.name for one in entry_points(group="vllm.general_plugins")}
    asked = os.environ.get("VLLM_PLUGINS")
    if _PLUGIN not in found:
        remedy = "install this package again: its entry points are older than its code"
        raise fail(f"vLLM does not find the plugin `{_PLUGIN}`", where="vLLM", remedy=remedy)
    if asked is not None and _PLUGIN not in asked.split(","):
        raise fail(
            f"vLLM would not load the plugin `{_PLUGIN}`", where="VLLM_PLUGINS", got=asked, remedy="add it there"
        )


def free_port(host: str, port: int) -> int:
    """Return the port, or a free one for 0.

    Raises:
        UserError: the port is in use, or the address is none of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            # Another server may have the address without listening yet: only this call then fails.
            probe.listen(1)
        except (OSError, OverflowError) as error:
            remedy = "choose another --port, or end the program that has it; --port 0 takes a free one"
            raise fail("cannot listen there", where=f"{host}:{port}", got=str(error), remedy=remedy) from error
        return int(probe.getsockname()[1])


def check_memory(plan: Plan, dtype: str, settings: EngineSettings, beside: int = 0) -> None:
    """Refuse a model that cannot fit: the base in the engine's dtype, its cache, and `beside` bytes for policies."""
    weights = sum(info.elements for info in plan.base.tensors.values()) * FLOATS[dtype].itemsize
    if vllm_device() == "cuda":
        # vLLM tells a small cache well; here only what can never fit is refused.
        needed, place = least_engine(weights // settings.tensor_parallel) + beside, "cuda"
    else:
        cache = int(os.environ.get("VLLM_CPU_KVCACHE_SPACE") or VLLM_SETTINGS["VLLM_CPU_KVCACHE_SPACE"]) * GIB
        needed, place = weights + cache + _PROCESSES + beside, "cpu"
    free = available_memory(place)
    if needed > free:
        raise fail(
            "not enough memory for the server",
            where="the GPU" if place == "cuda" else "this machine",
            expected=f"{needed / GIB:.1f} GiB free: weights {weights / GIB:.1f}, the rest for cache and computation",
            got=f"{free / GIB:.1f} GiB",
            remedy="set `generation.dtype: bfloat16`, end other programs, or spread it with --tensor-parallel",
        )


def check_run(header: Mapping[str, Any], folder: Path, plan: Plan) -> None:
    """Refuse a run that was made with another base or other policies than those of a plan."""
    recorded = header["policies"]
    if list(recorded) != list(plan.policies):
        what, expected, got = "its policies have other names", ", ".join(plan.policies), ", ".join(recorded)
        raise fail(what, where=str(folder), expected=expected, got=got, remedy="sweep again, or name its own --config")
    now = {"base": model_hash(plan.base.folder)}
    now |= {f"policy {name}": policy_hash(policy.folder) for name, policy in plan.policies.items()}
    then = {"base": header["base"]["hash"], **{f"policy {name}": one["hash"] for name, one in recorded.items()}}
    if changed := [name for name in now if now[name] != then[name]]:
        what = f"the run was measured with other weights: {', '.join(changed)}"
        raise fail(what, where=str(folder), remedy="run `rewarded-lines sweep` again, or serve without the run")

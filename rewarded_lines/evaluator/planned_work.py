"""What a memory plan is made for: this machine or one that is described, and a project's work or a typical one."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from rewarded_lines.checkpoints.adapter_config import read_adapter_config
from rewarded_lines.checkpoints.adapters import is_adapter
from rewarded_lines.checkpoints.reader import resolve_folder
from rewarded_lines.config import PromptSpec
from rewarded_lines.data.dataset_formats import read_prompts
from rewarded_lines.data.prompts import encode
from rewarded_lines.engines.kv_cache import kv_bytes
from rewarded_lines.engines.memory_plan import CUDA, ITEMSIZE, Job, Machine
from rewarded_lines.engines.model_shapes import ModelShape, read_shape
from rewarded_lines.engines.plan_options import PlanOptions
from rewarded_lines.engines.vllm_memory import working_memory
from rewarded_lines.errors import UserError
from rewarded_lines.extras import is_installed
from rewarded_lines.processes import GIB, available_host_memory, graphics_cards
from rewarded_lines.projects import PROJECT_FILE, Project, load_project
from rewarded_lines.reward_settings import RewardSpec
from rewarded_lines.rewards.model_sizes import LONGEST
from rewarded_lines.rewards.reward_memory import shared_out

# Without a GPU here, and none described.
_ASSUMED = 80 * GIB
_MOST_AT_ONCE = 256
# Arguments of vLLM that the plan reads, and those that take no memory of a GPU. Of the others a note tells.
_COUNTED = {
    *("gpu_memory_utilization", "max_num_seqs", "max_num_batched_tokens", "kv_cache_dtype", "tensor_parallel_size"),
    "enforce_eager",
}
_TAKE_NONE = {
    *("enable_prefix_caching", "prefix_caching_hash_algo", "async_scheduling", "scheduling_policy", "download_dir"),
    *("distributed_executor_backend", "max_parallel_loading_workers", "served_model_name", "log_level"),
}
_COUNTED_TYPES = ("auto", "fp8", "int8", *ITEMSIZE)


def plan_for(model: str, config: Path | None, options: PlanOptions) -> tuple[ModelShape, Job, Machine]:
    """Return what a memory plan for a folder, a Hub id or a size is made of.

    The project file is `config`, or the one in the current folder. The options win over it.

    Raises:
        UserError: the model or the project cannot be read, or its reward models are too large for `reward_memory:`.
    """
    job = Job(options.policies or 2, options.dtype or "bfloat16", lora=options.lora, share=options.engine_share)
    notes: list[str] = []
    file = config or Path(PROJECT_FILE)
    project = load_project(file) if config is not None or file.is_file() else None
    machine = machine_here(options, project.config.engine.tensor_parallel if project else 1)
    if project:
        job = job_of_project(project, job, options, machine, notes.append)
    shape = read_shape(model)
    if job.lora:
        notes.append("LoRA: an upper bound, as if the policies adapted every linear layer")
    return replace(shape, notes=(*shape.notes, *notes)), job, machine


def machine_here(options: PlanOptions, gpus: int) -> Machine:
    """Return this machine, with so many GPUs; options describe another GPU and another host's memory.

    Without a GPU here and in the options, one of 80 GiB is assumed.
    """
    found = [line.rpartition(",") for line in graphics_cards()]
    sizes = [(name.strip(), int(number[1])) for name, _, size in found if (number := re.search(r"(\d+) MiB", size))]
    name, size = min(sizes, key=lambda one: one[1]) if sizes else ("GPU (none here, so one is assumed)", 0)
    card, host = options.gpu_memory, options.host_memory
    memory = int(card * GIB) if card else (size << 20) or _ASSUMED
    room = int(host * GIB) if host else available_host_memory()
    # Of another machine the disk is not known.
    disk = 0 if card and host else shutil.disk_usage(Path()).free
    return Machine(options.gpus or gpus, memory, room, disk, "" if card else name)


def job_of_project(
    project: Project, job: Job, options: PlanOptions, machine: Machine, tell: Callable[[str], None]
) -> Job:
    """Return the job with a project's policies, engine, type, longest sequence, number of requests, and reward models.

    The options win over the project. `tell` gets a note on what could not be found out, or is not counted.
    """
    config, engine = project.config, project.config.engine
    longest, requests = _longest(project, tell)
    args = _counted_args(engine.args, tell)
    most = int(args.get("max_num_seqs", _MOST_AT_ONCE))
    return replace(
        job,
        policies=options.policies or len(config.policies) or job.policies,
        lora=job.lora or _adapter_rank(project, tell),
        resident=engine.resident,
        share=job.share or args.get("gpu_memory_utilization"),
        args=args,
        dtype=options.dtype or config.generation.dtype,
        longest=longest or job.longest,
        at_once=min(most, requests * config.generation.n) if requests else min(most, job.at_once),
        rewards=_reward_bytes(project, machine, tell),
    )


def _counted_args(args: dict[str, Any], tell: Callable[[str], None]) -> dict[str, Any]:
    """Return the arguments of vLLM that a plan counts; tell of others that may change how much memory is taken."""
    given = {name: value for name, value in args.items() if value is not None}
    for name in sorted(given.keys() - _COUNTED - _TAKE_NONE):
        tell(f"engine: `{name}` is not counted; it may change the memory")
    if not str(given.get("kv_cache_dtype", "auto")).startswith(_COUNTED_TYPES):
        tell(f"KV cache: an upper bound; `{given['kv_cache_dtype']}` is counted as the engine's dtype")
    return {name: value for name, value in given.items() if name in _COUNTED}


def _adapter_rank(project: Project, tell: Callable[[str], None]) -> int:
    """Return the largest rank of the project's policies; 0 if they are not all adapters."""
    ranks = []
    policies = project.config.policies
    for name, reference in policies.items():
        try:
            folder = resolve_folder(project.resolve(reference), weights=False)
            if is_adapter(folder):
                config = read_adapter_config(folder)
                ranks.append(max(config.rank, *config.rank_pattern.values(), 0))
        except UserError as error:
            tell(f"policy {name} was not looked at: {str(error).splitlines()[0]}")
    if len(ranks) < len(policies):
        if ranks:
            tell("not all policies are known to be adapters, so all are counted as whole models")
        return 0
    if len(set(ranks)) > 1:
        tell(f"LoRA: an upper bound; the ranks {', '.join(map(str, ranks))} are all counted as {max(ranks)}")
    return max(ranks, default=0)


def _longest(project: Project, tell: Callable[[str], None]) -> tuple[int, int]:
    """Return the tokens of the longest prompt with its response, and the number of prompts; 0 where unknown."""
    config = project.config
    if not isinstance(config.prompts, PromptSpec) or not config.base or not is_installed("transformers"):
        tell("the prompts were not measured")
        return 0, 0
    from rewarded_lines.engines.tokenizers import load_tokenizer

    try:
        prompts = [row["prompt"] for row in read_prompts(config.prompts, project.root, tell)]
        tokens = encode(load_tokenizer(project.resolve(config.base), project.generation), prompts)
    except (UserError, OSError, ValueError) as error:
        tell(f"the prompts were not measured: {str(error).splitlines()[0]}")
        return 0, 0
    return max(map(len, tokens), default=0) + config.generation.max_tokens + 1, len(tokens)


def _reward_bytes(project: Project, machine: Machine, tell: Callable[[str], None]) -> dict[str, int]:
    """Return the bytes of the reward models that are at once on the engine's GPU with most of them, by their rewards.

    Rewards that share a model count once. Large models take turns, as in a sweep; of these the largest counts.
    """
    found = _reward_sizes(project, machine.gpus, tell)
    rows: list[dict[str, int]] = [{}]
    for sizes in found.values():
        names, each = list(sizes), list(sizes.values())
        stay, peak = shared_out(each, machine.card - CUDA, machine.card, project.config.reward_memory)
        row = {f"reward {names[at]}": each[at] for at in sorted(stay)}
        rest = peak - sum(row.values())
        rows.append(row | ({"rewards that take turns": rest} if rest else {}))
    return max(rows, key=lambda row: sum(row.values()))


def _reward_sizes(project: Project, gpus: int, tell: Callable[[str], None]) -> dict[str, dict[str, int]]:
    """Return the bytes of the reward models' weights on each of the engine's GPUs."""
    found: dict[str, dict[str, int]] = {f"cuda:{at}": {} for at in range(gpus)}
    seen: set[tuple[str | None, ...]] = set()
    for name, spec in project.config.rewards.items():
        reference = spec.model or (None if spec.url else spec.judge)
        device = "cuda:0" if spec.device in (None, "cuda") else str(spec.device)
        key = (reference, spec.backend, spec.dtype, device)
        if not reference or device not in found or key in seen:
            continue
        seen.add(key)
        try:
            shape = read_shape(project.resolve(reference))
        except UserError as error:
            tell(f"reward {name} is not counted: {str(error).splitlines()[0]}")
        else:
            known = ITEMSIZE.get(spec.dtype)
            weights = shape.parameters * known if known else shape.stored
            found[device][name] = weights + (_beside_weights(shape, spec, weights) if spec.backend == "vllm" else 0)
    return {device: sizes for device, sizes in found.items() if sizes}


def _beside_weights(shape: ModelShape, spec: RewardSpec, weights: int) -> int:
    """Return the bytes that a reward's engine of vLLM holds beside its weights, as `engine_size` counts them.

    An upper bound: the longest text may have `max_tokens`, or all that vLLM reads.
    """
    longest, itemsize = min(spec.max_tokens or LONGEST, LONGEST), weights // shape.parameters
    sampled = shape.vocabulary if spec.judge is not None else 0
    cache = kv_bytes(shape.cache, longest, itemsize)
    return cache + working_memory(shape.hidden, shape.inner // 2, longest, itemsize, sampled)

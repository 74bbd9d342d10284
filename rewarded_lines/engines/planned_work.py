"""What a memory plan is made for: this machine or one that is described, and a project's work or a typical one."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from rewarded_lines.config import PromptSpec
from rewarded_lines.data.dataset_formats import read_prompts
from rewarded_lines.data.prompts import encode
from rewarded_lines.doctor import graphics_cards
from rewarded_lines.engines.memory_plan import GIB, ITEMSIZE, Job, Machine
from rewarded_lines.engines.model_shapes import ModelShape, read_shape
from rewarded_lines.engines.plan_options import PlanOptions
from rewarded_lines.errors import UserError
from rewarded_lines.extras import is_installed
from rewarded_lines.processes import available_host_memory
from rewarded_lines.projects import PROJECT_FILE, Project, load_project

# Without a GPU here, and none described.
_ASSUMED = 80 * GIB
_MOST_AT_ONCE = 256


def plan_for(model: str, config: Path | None, options: PlanOptions) -> tuple[ModelShape, Job, Machine]:
    """Return what a memory plan is made of.

    Args:
        model: a folder, a Hub id or a size.
        config: the project file; None: that of the current folder, if there is one.
        options: what the project does not say; they win over it.

    Raises:
        UserError: the model or the project cannot be read.
    """
    machine = machine_here(options)
    job = Job(options.policies or 2, options.dtype or "bfloat16", lora=options.lora, share=options.engine_share)
    notes: list[str] = []
    file = config or Path(PROJECT_FILE)
    if config is not None or file.is_file():
        job = job_of_project(load_project(file), job, options, notes.append)
    shape = read_shape(model)
    return replace(shape, notes=(*shape.notes, *notes)), job, machine


def machine_here(options: PlanOptions) -> Machine:
    """Return this machine; options describe another GPU and another host's memory.

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
    return Machine(options.gpus, memory, room, disk, "" if card else name)


def job_of_project(project: Project, job: Job, options: PlanOptions, tell: Callable[[str], None]) -> Job:
    """Return the job with a project's policies, type, longest sequence, number of requests, and reward models.

    Args:
        project: the project file.
        job: what the options say.
        options: they win over the project.
        tell: gets a note on what could not be found out.
    """
    config, engine = project.config, project.config.engine
    longest, requests = _longest(project, tell)
    return replace(
        job,
        policies=options.policies or len(config.policies) or job.policies,
        resident=engine.resident,
        share=job.share or engine.args.get("gpu_memory_utilization"),
        eager=bool(engine.args.get("enforce_eager")),
        dtype=options.dtype or config.generation.dtype,
        longest=longest or job.longest,
        at_once=min(_MOST_AT_ONCE, requests * config.generation.n) if requests else job.at_once,
        rewards=_reward_bytes(project, tell),
    )


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


def _reward_bytes(project: Project, tell: Callable[[str], None]) -> dict[str, int]:
    """Return the bytes of each reward model's weights; rewards that share a model count once."""
    found: dict[str, int] = {}
    seen: set[tuple[str, str]] = set()
    for name, spec in project.config.rewards.items():
        reference, kind = (
            spec.model or (None if spec.url else spec.judge),
            str(getattr(spec, "dtype", None) or "float32"),
        )
        if not reference or spec.device == "cpu" or (reference, kind) in seen:
            continue
        seen.add((reference, kind))
        try:
            shape = read_shape(project.resolve(reference))
            found[f"reward {name}"] = shape.parameters * ITEMSIZE[kind] if kind in ITEMSIZE else shape.stored
        except (UserError, KeyError) as error:
            tell(f"reward {name} is not counted: {str(error).splitlines()[0]}")
    return found

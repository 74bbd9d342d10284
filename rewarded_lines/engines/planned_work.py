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
from rewarded_lines.errors import UserError, did_you_mean, fail
from rewarded_lines.extras import is_installed
from rewarded_lines.folders import existing
from rewarded_lines.processes import available_host_memory
from rewarded_lines.projects import PROJECT_FILE, Project, load_project

# Without a GPU here, and none described.
_ASSUMED = 80 * GIB
_MOST_AT_ONCE = 256


def plan_for(
    model: str,
    config: Path | None,
    work: tuple[int | None, str | None, int, float | None],
    place: tuple[int, float | None, float | None],
) -> tuple[ModelShape, Job, Machine]:
    """Return what a memory plan is made of.

    Args:
        model: a folder, a Hub id or a size.
        config: the project file; None: that of the current folder, if there is one.
        work: policies, dtype, rank of LoRA and the engine's share, as `typical_job` takes them.
        place: number of GPUs, GiB of each and of the host, as `machine_here` takes them.

    Raises:
        UserError: an option, the model or the project cannot be read.
    """
    job, machine = typical_job(*work), machine_here(*place)
    notes: list[str] = []
    file = config or Path(PROJECT_FILE)
    if config is not None or file.is_file():
        project = load_project(file)
        job = job_of_project(project, job, work[1], notes.append)
        if work[0] is None:
            job = replace(job, policies=len(project.config.policies) or job.policies)
    shape = read_shape(model)
    return replace(shape, notes=(*shape.notes, *notes)), job, machine


def machine_here(gpus: int = 1, card: float | None = None, host: float | None = None, root: Path = Path()) -> Machine:
    """Return this machine; `card` and `host`, in GiB, describe another GPU and another host's memory.

    Without a GPU and without `card`, a GPU of 80 GiB is assumed.
    """
    found = [line.rpartition(",") for line in graphics_cards()]
    sizes = [(name.strip(), int(number[1])) for name, _, size in found if (number := re.search(r"(\d+) MiB", size))]
    name, size = min(sizes, key=lambda one: one[1]) if sizes else ("GPU (none here, so one is assumed)", 0)
    memory = int(card * GIB) if card else (size << 20) or _ASSUMED
    room = int(host * GIB) if host else available_host_memory()
    # Of another machine the disk is not known.
    disk = 0 if card and host else shutil.disk_usage(existing(root)).free
    return Machine(gpus, memory, room, disk, "" if card else name)


def typical_job(policies: int | None, dtype: str | None, lora: int, share: float | None) -> Job:
    """Return a job by its options; None stands for two policies, bfloat16, and the share that fits.

    Raises:
        UserError: no such type, or a number out of its range.
    """
    if dtype is not None and dtype not in ITEMSIZE:
        expected = ", ".join(ITEMSIZE)
        raise fail(f"unknown dtype `{dtype}`", where="--dtype", expected=expected, remedy=did_you_mean(dtype, ITEMSIZE))
    for name, value, good in (
        ("--policies", policies, policies is None or policies >= 1),
        ("--lora", lora, lora >= 0),
        ("--engine-share", share, share is None or 0 < share <= 1),
    ):
        if not good:
            raise fail("not a possible number", where=name, got=str(value))
    return Job(policies=policies or 2, dtype=dtype or "bfloat16", lora=lora, share=share)


def job_of_project(project: Project, job: Job, dtype: str | None, tell: Callable[[str], None]) -> Job:
    """Return the job with a project's policies, type, longest sequence, number of requests, and reward models.

    Args:
        project: the project file.
        job: what the options say.
        dtype: the option; it wins over the project's.
        tell: gets a note on what could not be found out.
    """
    config = project.config
    longest, requests = _longest(project, tell)
    engine = config.engine
    return replace(
        job,
        resident=engine.resident,
        share=job.share or engine.args.get("gpu_memory_utilization"),
        eager=bool(engine.args.get("enforce_eager")),
        dtype=dtype or config.generation.dtype,
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

"""How `rewarded-lines doctor --for` shows a memory plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from rewarded_lines.processes import GIB

if TYPE_CHECKING:
    from rewarded_lines.engines.memory_plan import Job, Machine, MemoryPlan
    from rewarded_lines.engines.model_shapes import ModelShape

_LEVELS = {
    "gpu": "base and policies wait on the GPU",
    "host": "base and policies wait in the host's memory",
    "disk": "base and policies are read from disk for every merge",
    "slots": "merged adapters go into slots of the engine; the base stays",
}
_ESTIMATES = {"batch", "CUDA graphs", "CUDA"}


def show_plan(shape: ModelShape, job: Job, machine: Machine, plan: MemoryPlan, console: Console) -> None:
    """Print the model, what goes where, and what does not fit."""
    kind = f"LoRA adapters of rank {job.lora}" if job.lora else "whole models"
    total = sum([*plan.engine.values(), *plan.beside.values()])
    remarks = {
        **dict.fromkeys(_ESTIMATES, "estimate"),
        "KV cache": f"{min(plan.sequences, job.at_once):,} sequences of {gib(plan.sequence)}",
        "one merged model": f"{gib(machine.disk)} are free" if machine.disk else "",
    }
    lines = [
        f"{shape.name}: {shape.parameters / 1e9:.2f}B parameters, {shape.layers} layers, {job.dtype}",
        f"{job.policies} policies, {kind}; sequences of up to {job.longest:,} tokens",
        f"{machine.gpus} × {machine.name or 'GPU'}, {gib(machine.card)}; host {gib(machine.host)}",
        *_rows("each GPU, the engine", plan.engine, remarks),
        *_rows(
            "each GPU, beside it", {**plan.beside, "in all": total}, {**remarks, "in all": f"of {gib(machine.card)}"}
        ),
        *_rows("host", plan.host, remarks),
        *_rows("disk", plan.disk, remarks),
        "",
        f"resident: {plan.resident}   # {_LEVELS[plan.resident]}",
        f"gpu_memory_utilization: {plan.share:.2f}   # room for {plan.sequences:,} sequences at once",
        *(f"note: {note}" for note in shape.notes),
    ]
    for line in lines:
        console.print(Text(line), soft_wrap=True)
    for problem in plan.problems:
        console.print(Text(f"✗ {problem}", style="red"), soft_wrap=True)


def gib(size: float) -> str:
    """Return a size in GiB or MiB, as nvidia-smi and vLLM count."""
    if size < GIB / 10:
        return f"{size / (1 << 20):,.1f} MiB"
    return f"{size / GIB:,.1f} GiB"


def _rows(place: str, parts: Mapping[str, int], remarks: Mapping[str, str]) -> list[str]:
    rows = [f"  {what:<30}{gib(size):>12}  {remarks.get(what, '')}".rstrip() for what, size in parts.items()]
    return ["", place, *rows]

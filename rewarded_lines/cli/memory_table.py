"""How `rewarded-lines doctor --for` shows a memory plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from rewarded_lines.engines.memory_plan import Job, Machine, MemoryPlan
    from rewarded_lines.engines.model_shapes import ModelShape

_GIB = 1 << 30
_LEVELS = {
    "gpu": "base and policies wait on the GPU",
    "host": "base and policies wait in the host's memory",
    "disk": "base and policies are read from disk for every merge",
    "slots": "merged adapters go into slots of the engine; the base stays",
}
_ESTIMATES = {"batch", "CUDA graphs", "CUDA"}


def show_plan(shape: ModelShape, job: Job, machine: Machine, plan: MemoryPlan, console: Console) -> None:
    """Print the model, a table of what goes where, and what does not fit."""
    kind = f"LoRA adapters of rank {job.lora}" if job.lora else "whole models"
    console.print(f"{shape.name}: {shape.parameters / 1e9:.2f}B parameters, {shape.layers} layers, {job.dtype}")
    console.print(f"{job.policies} policies, {kind}; sequences of up to {job.longest:,} tokens")
    console.print(f"{machine.gpus} × {machine.name or 'GPU'}, {gib(machine.card)}; host {gib(machine.host)}\n")
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_column()
    table.add_column()
    table.add_column(justify="right")
    table.add_column(overflow="fold")
    _rows(table, "each GPU: engine", plan.engine, {"KV cache": _cache(job, plan)})
    _rows(table, "each GPU: beside", plan.beside, {})
    total = sum([*plan.engine.values(), *plan.beside.values()])
    table.add_row("", "in all", gib(total), f"of {gib(machine.card)}")
    _rows(table, "host", plan.host, {})
    _rows(table, "disk", plan.disk, {"one merged model": f"{gib(machine.disk)} are free" if machine.disk else ""})
    console.print(table)
    lines = [
        f"\nresident: {plan.resident}   # {_LEVELS[plan.resident]}",
        f"gpu_memory_utilization: {plan.share:.2f}   # room for {plan.sequences:,} sequences at once",
        *(f"note: {note}" for note in shape.notes),
    ]
    for line in lines:
        console.print(Text(line), soft_wrap=True)
    for problem in plan.problems:
        console.print(Text(f"✗ {problem}", style="red"), soft_wrap=True)


def gib(size: float) -> str:
    """Return a size in GiB or MiB, as nvidia-smi and vLLM count."""
    if size < _GIB / 10:
        return f"{size / (1 << 20):,.1f} MiB"
    return f"{size / _GIB:,.1f} GiB"


def _cache(job: Job, plan: MemoryPlan) -> str:
    return f"{min(plan.sequences, job.at_once):,} sequences of {gib(plan.sequence)}"


def _rows(table: Table, place: str, parts: Mapping[str, int], remarks: Mapping[str, str]) -> None:
    for number, (what, size) in enumerate(parts.items()):
        remark = remarks.get(what, "estimate" if what in _ESTIMATES else "")
        table.add_row("" if number else place, what, gib(size), remark)

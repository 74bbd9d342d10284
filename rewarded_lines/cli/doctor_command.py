"""`rewarded-lines doctor`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rewarded_lines.cli.display import progress_bar, show_json, stdout_for_results
from rewarded_lines.cli.parameters import AsJson, Quiet, as_option
from rewarded_lines.engines.plan_options import PlanOptions
from rewarded_lines.errors import fail
from rewarded_lines.options import takes_fields
from rewarded_lines.processes import GIB

if TYPE_CHECKING:
    from rewarded_lines.doctor import Finding
    from rewarded_lines.engines.memory_plan import Job, Machine, MemoryPlan
    from rewarded_lines.engines.model_shapes import ModelShape

_MARKS = {"ok": ("✓", "green"), "warning": ("!", "yellow"), "broken": ("✗", "red")}
_NAME_WIDTH = 14
_LEVELS = {
    "gpu": "base and policies wait on the GPU",
    "host": "base and policies wait in the host's memory",
    "disk": "base and policies are read from disk for every merge",
    "slots": "merged adapters go into slots of the engine; the base stays",
}
_ESTIMATES = {"batch", "CUDA graphs", "CUDA"}


@takes_fields(PlanOptions, "options", annotate=as_option)
def doctor(
    *,
    thorough: Annotated[
        bool,
        typer.Option("--thorough", help="Also import torch, transformers and vLLM, and start an engine (a minute)."),
    ] = False,
    config: Annotated[
        Path | None, typer.Option(help="Project file to check; by default ./rewarded-lines.yaml, if it exists.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--for", metavar="MODEL", help="Plan memory for a folder, a Hub id, or a size such as 7B."),
    ] = None,
    options: PlanOptions,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Show what works here, what does not, and the command that repairs it.

    ✓ works; ! is missing or may hurt; ✗ makes a command fail. With a ✗ the
    exit code is 1. Nothing is installed or changed, and no network is used.
    Without --thorough no library is imported: versions come from the
    packages' metadata.

    With --for, show instead what a sweep over a model needs of memory, and
    what fits where. Of the model only its config and the headers of its
    weights are read. A Hub id is looked up on the network. Prompts, policies,
    reward models and `engine:` are those of the project file, if there is one.
    If something does not fit, the exit code is 1.

    \b
    rewarded-lines doctor
    rewarded-lines doctor --thorough
    rewarded-lines doctor --json | jq '.checks[] | select(.state != "ok")'
    rewarded-lines doctor --for 7B --policies 2 --gpus 1
    rewarded-lines doctor --for my-sft --lora 16 --gpu-memory 24 --json
    """
    if thorough and model is not None or model is None and options != PlanOptions():
        remedy = "leave out `--thorough`" if thorough and model is not None else "add `--for MODEL`"
        raise fail("options of a memory plan and of the check of this installation do not mix", remedy=remedy)
    if model is not None:
        _plan(model, config, options, as_json)
        return
    with progress_bar("Doctor", quiet=quiet or as_json, unit="check") as bar:
        from rewarded_lines.doctor import diagnose

        findings = diagnose(config, thorough=thorough, progress=bar)
    ok = all(one.state != "broken" for one in findings)
    if as_json:
        show_json({"ok": ok, "checks": [vars(one) for one in findings]})
    else:
        _show(findings, Console(highlight=False))
    if not ok:
        raise typer.Exit(1)


def _plan(model: str, config: Path | None, options: PlanOptions, as_json: bool) -> None:
    """Show a memory plan."""
    from rewarded_lines.engines.memory_plan import plan_memory
    from rewarded_lines.evaluator.planned_work import plan_for

    with stdout_for_results():
        shape, job, machine = plan_for(model, config, options)
    plan = plan_memory(shape, job, machine)
    if as_json:
        show_json({**plan.as_dict(), "model": asdict(shape), "job": asdict(job), "machine": asdict(machine)})
    else:
        _show_plan(shape, job, machine, plan, Console(highlight=False))
    if plan.problems:
        raise typer.Exit(1)


def _show_plan(shape: ModelShape, job: Job, machine: Machine, plan: MemoryPlan, console: Console) -> None:
    """Print the model, what goes where, and what does not fit."""
    kind = f"LoRA adapters of rank {job.lora}" if job.lora else "whole models"
    total = sum([*plan.engine.values(), *plan.beside.values()])
    remarks = {
        **dict.fromkeys(_ESTIMATES, "estimate"),
        "KV cache": f"{min(plan.sequences, job.at_once):,} sequences of {_gib(plan.sequence)}",
        "one merged model": f"{_gib(machine.disk)} are free" if machine.disk else "",
    }
    lines = [
        f"{shape.name}: {shape.parameters / 1e9:.2f}B parameters, {shape.layers} layers, {job.dtype}",
        f"{job.policies} policies, {kind}; sequences of up to {job.longest:,} tokens",
        f"{machine.gpus} × {machine.name or 'GPU'}, {_gib(machine.card)}; host {_gib(machine.host)}",
        *_rows("each GPU, the engine", plan.engine, remarks),
        *_rows(
            "each GPU, beside it", {**plan.beside, "in all": total}, {**remarks, "in all": f"of {_gib(machine.card)}"}
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


def _gib(size: float) -> str:
    """Return a size in GiB or MiB, as nvidia-smi and vLLM count."""
    if size < GIB / 10:
        return f"{size / (1 << 20):,.1f} MiB"
    return f"{size / GIB:,.1f} GiB"


def _rows(place: str, parts: Mapping[str, int], remarks: Mapping[str, str]) -> list[str]:
    rows = [f"  {what:<30}{_gib(size):>12}  {remarks.get(what, '')}".rstrip() for what, size in parts.items()]
    return ["", place, *rows]


def _show(findings: list[Finding], console: Console) -> None:
    for finding in findings:
        mark, style = _MARKS[finding.state]
        row = Table.grid(padding=(0, 1))
        row.add_column(width=1)
        row.add_column(width=_NAME_WIDTH)
        row.add_column(overflow="fold")
        row.add_row(Text(mark, style=style), Text(finding.name), Text(finding.found))
        console.print(row)
        for line in finding.remedy.splitlines():
            # Commands are not folded, so that they can be copied.
            console.print(Text(" " * (_NAME_WIDTH + 3) + line, style="bold"), soft_wrap=True)
    count = Counter[str](finding.state for finding in findings)
    parts = [f"{count['ok']} of {len(findings)} checks are fine"]
    parts += [f"{count[state]} {state}" for state in ("warning", "broken") if count[state]]
    console.print(Text(f"\n{', '.join(parts)}.", style="dim"))

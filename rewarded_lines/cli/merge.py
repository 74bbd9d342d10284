"""`rewarded-lines merge`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from rewarded_lines.cli.progress import progress_bar

if TYPE_CHECKING:
    from rewarded_lines.merging.merge import MergeResult


def merge(
    base: Annotated[str | None, typer.Option(help="SFT model: folder or Hub id.")] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(help="A policy, \\[NAME=]FOLDER or Hub id; repeat for each.", show_default=False),
    ] = None,
    lam: Annotated[
        list[str] | None,
        typer.Option(help="λ of the first of two policies, or weights 0.2,0.3,0.5; repeat for several outputs."),
    ] = None,
    alpha: Annotated[float, typer.Option(help="LiNeS α: scale of the first block.")] = 1.0,
    beta: Annotated[float, typer.Option(help="LiNeS β: added by the last block; 0 is Rewarded Soups.")] = 1.0,
    method: Annotated[str, typer.Option(help="How residuals are joined: soup.")] = "soup",
    out: Annotated[Path | None, typer.Option(help="Output folder; default merged/lam=…")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:1.")] = "cpu",
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file.")] = "5GB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, write nothing.")] = False,
    extrapolate: Annotated[bool, typer.Option("--extrapolate", help="Allow λ outside the simplex.")] = False,
    layers: Annotated[str | None, typer.Option(help=r"Pattern of the block list, e.g. 'blocks\.(\d+)\.'")] = None,
    config: Annotated[Path, typer.Option(help="Names base and policies.")] = Path("rewarded-lines.yaml"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Merge policies over their SFT base, layer by layer.

    θ = θ_base + λ(ℓ)·Σ λᵢ·(θᵢ − θ_base) with λ(ℓ) = α + β·(ℓ−1)/(L−1). Tensors stream from disk to disk; inputs are
    only read.

    \b
    rewarded-lines merge --lam 0.5
        base and policies from ./rewarded-lines.yaml
    rewarded-lines merge --base sft --policy helpful=ppo-a --policy brief=ppo-b --lam 0.3 --out merged
    rewarded-lines merge --lam 0.25 --lam 0.5 --lam 0.75 --beta 0 --out soups
        three Rewarded Soups in soups/lam=0.25 …, each input read once
    """
    from rewarded_lines.merging.merge import merge as run

    base, policies = _inputs(base, policy or [], config)
    with progress_bar("Merging", quiet=as_json, unit="bytes") as bar:
        results = run(
            base,
            policies,
            lam or ["0.5"],
            alpha=alpha,
            beta=beta,
            method=method,
            out=out,
            dtype=dtype,
            device=device,
            max_shard_size=max_shard_size,
            overwrite=overwrite,
            dry_run=dry_run,
            layers=layers,
            extrapolate=extrapolate,
            progress=lambda name, size, total: bar(size, total),
        )
    if as_json:
        typer.echo(json.dumps([_as_dict(result, list(policies)) for result in results], indent=2))
    else:
        Console().print(_table(results, list(policies)))


def _inputs(base: str | None, policy: list[str], config: Path) -> tuple[str, Mapping[str, str]]:
    """Take base and policies from the command line, and from the project file what the command line leaves out."""
    from rewarded_lines.config import load_project
    from rewarded_lines.merging.merge import name_policies

    named = name_policies([_name(text) for text in policy]) if policy else {}
    if base and named:
        return base, named
    project = load_project(config)
    project.require(*([] if base else ["base"]), *([] if named else ["policies"]))
    base = base or project.resolve(str(project.config.base))
    return base, named or {name: project.resolve(path) for name, path in project.config.policies.items()}


def _name(text: str) -> tuple[str, str]:
    name, separator, path = text.partition("=")
    return (name, path) if separator else (Path(text).name, text)


def _as_dict(result: MergeResult, names: list[str]) -> dict[str, Any]:
    return {
        "out": str(result.out) if result.out else None,
        "weights": dict(zip(names, result.spec.weights, strict=True)),
        "method": result.spec.method,
        "alpha": result.spec.alpha,
        "beta": result.spec.beta,
        "tensors": result.tensors,
        "bytes": result.bytes,
        "scales": list(result.scales),
    }


def _table(results: list[MergeResult], names: list[str]) -> Table:
    table = Table(title="dry run: nothing written" if results[0].out is None else "merged")
    for heading in (*(f"λ {name}" for name in names), "scale, first to last block", "size", "folder"):
        table.add_column(heading, overflow="fold")
    for result in results:
        table.add_row(
            *(f"{weight:g}" for weight in result.spec.weights),
            f"{result.scales[0]:g} to {result.scales[-1]:g}",
            f"{result.bytes / 1e6:,.1f} MB",
            str(result.out or "—"),
        )
    return table

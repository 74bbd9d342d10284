"""`rewarded-lines merge`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rewarded_lines.cli.display import progress_bar
from rewarded_lines.cli.mergekit import merge_from_mergekit
from rewarded_lines.cli.parameters import AsJson, Layers, Quiet, dtypes, kinds, merge_methods, outsides, run_folders
from rewarded_lines.cli.push import Destination, Private, Revision
from rewarded_lines.errors import fail, printable
from rewarded_lines.rules.methods import METHODS

if TYPE_CHECKING:
    from rewarded_lines.merging.cards import Additions
    from rewarded_lines.merging.merge import MergeResult

_METHOD = "Options of the methods"
_PUBLISHING = "Publishing"
METHODS_HELP = "\n\n".join(f"{name}: {row.summary}" for name, row in METHODS.items())


# What may stand beside --from: where things are now, and how to write.
_WITH_RECORD = {"record", "base", "policy", "out", "device", "overwrite", "allow_nonfinite", "as_json", "quiet"}
_WITH_RECORD |= {"run", "push_to_hub", "private", "revision"}
# Beside --from-mergekit: the file says what is merged, these say how it is written.
_WITH_MERGEKIT = (_WITH_RECORD - {"record", "policy"}) | {
    "from_mergekit",
    "seed",
    "max_shard_size",
    "dry_run",
    "layers",
}


def _option(name: str) -> Any:
    """Return an option of methods, with the help and the defaults that their table gives."""
    takers = {method: row.options[name] for method, row in METHODS.items() if name in row.options}
    defaults = ", ".join(f"{method} ({option.default})" for method, option in takers.items())
    option = next(iter(takers.values()))
    choices = f": {' or '.join(option.choices)}" if option.choices else ""
    return typer.Option(help=f"{defaults}: {option.help}{choices}.", rich_help_panel=_METHOD, show_default=False)


def merge(
    ctx: typer.Context,
    base: Annotated[str | None, typer.Option(help="SFT model: folder or Hub id.")] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(help="A policy, \\[NAME=]FOLDER or Hub id; repeat for each.", show_default=False),
    ] = None,
    lam: Annotated[
        list[str] | None,
        typer.Option(help="λ of the first of two policies, or weights 0.2,0.3,0.5; repeat for several outputs."),
    ] = None,
    alpha: Annotated[str, typer.Option(help="LiNeS α: scale of the first block; auto for the authors' choice.")] = "1",
    beta: Annotated[float, typer.Option(help="LiNeS β: added by the last block; 0 is Rewarded Soups.")] = 1.0,
    outside: Annotated[
        str,
        typer.Option(
            help="What embeddings, norm and head get: alpha, or depth (as the block beside them).",
            autocompletion=outsides,
        ),
    ] = "alpha",
    method: Annotated[
        str,
        typer.Option(help=f"How residuals are joined: {', '.join(METHODS)}; see below.", autocompletion=merge_methods),
    ] = "soup",
    density: Annotated[float | None, _option("density")] = None,
    scope: Annotated[str | None, _option("scope")] = None,
    join: Annotated[str | None, _option("join")] = None,
    seed: Annotated[int | None, _option("seed")] = None,
    tall: Annotated[float | None, _option("tall")] = None,
    agree: Annotated[int | None, _option("agree")] = None,
    score: Annotated[
        str | None,
        typer.Option(
            help="greedy: a command that prints a number for {model}, or file.py:function.", rich_help_panel=_METHOD
        ),
    ] = None,
    as_: Annotated[
        str,
        typer.Option(
            "--as",
            help="full models, LoRA adapter, or auto: an adapter if all policies are adapters.",
            autocompletion=kinds,
        ),
    ] = "auto",
    out: Annotated[Path | None, typer.Option(help="Output folder; default merged/lam=…")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.", autocompletion=dtypes)] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:1.")] = "cpu",
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file.")] = "5GB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, write nothing.")] = False,
    extrapolate: Annotated[bool, typer.Option("--extrapolate", help="Allow λ outside the simplex.")] = False,
    allow_nonfinite: Annotated[
        bool, typer.Option("--allow-nonfinite", help="Let NaN and infinite values pass.")
    ] = False,
    layers: Layers = None,
    config: Annotated[Path, typer.Option(help="Names base and policies.")] = Path("rewarded-lines.yaml"),
    record: Annotated[
        Path | None,
        typer.Option("--from", help="A merge.json: make that merge again, the same bits, from the same inputs."),
    ] = None,
    from_mergekit: Annotated[
        Path | None, typer.Option(help="A mergekit YAML: make the merge that it asks for, and print the command.")
    ] = None,
    run: Annotated[
        Path | None,
        typer.Option(
            help="A run of these policies: the model card shows the scores of this merge, and the figure. "
            "Default: `sweep` beside the project file, if it is one and has its report.",
            rich_help_panel=_PUBLISHING,
            autocompletion=run_folders,
        ),
    ] = None,
    push_to_hub: Annotated[
        str | None,
        typer.Option(metavar="OWNER/NAME", help="Upload the merged folder to the Hub.", rich_help_panel=_PUBLISHING),
    ] = None,
    private: Private = False,
    revision: Revision = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Merge policies over their SFT base, layer by layer.

    θ = θ_base + λ(ℓ)·m(τ₁ … τ_N; λ) with τᵢ = θᵢ − θ_base,
    λ(ℓ) = α + β·(ℓ−1)/(L−1) and the method m, by default Σ λᵢτᵢ.
    Tensors stream from disk to disk; inputs are only read.

    \b
    rewarded-lines merge --lam 0.5
        base and policies from ./rewarded-lines.yaml
    rewarded-lines merge --base sft --policy helpful=ppo-a \\
        --policy brief=ppo-b --lam 0.3 --out merged
    rewarded-lines merge --lam 0.25 --lam 0.5 --lam 0.75 --beta 0 --out soups
        three Rewarded Soups in soups/lam=0.25 …, each input read once
    rewarded-lines merge --base sft --policy tuned --alpha 0.3 --beta 0.7
        single-task LiNeS, against forgetting;
        --method wise-ft --lam 0.5 --beta 0 is WiSE-FT
    rewarded-lines merge --method ties --density 0.2 --alpha auto --lam 0.5
        TIES with LiNeS, α by the authors' heuristic, printed
    rewarded-lines merge --method greedy --score "python score.py {model}"
    rewarded-lines merge --base sft --policy lora-a --policy lora-b
        LoRA adapters (PEFT) give an adapter, exactly their weighted sum;
        --as full folds it into the base
    rewarded-lines merge --from merged/merge.json --out again
    rewarded-lines merge --from-mergekit config.yaml --out merged
        the same merge as mergekit's; what has no exact counterpart is refused
    rewarded-lines merge --lam 0.3 --push-to-hub me/my-merge --private
        the token comes from HF_TOKEN or `hf auth login`
    """
    from rewarded_lines.publishing.card_additions import card_additions

    if record is not None:
        _refuse_beside(ctx, "--from", "makes a merge again as it was", _WITH_RECORD)
    if from_mergekit is not None:
        _refuse_beside(ctx, "--from-mergekit", "makes the merge of the file", _WITH_MERGEKIT)
    hub = Destination.checked(push_to_hub, private, revision, outputs=len(lam or [""]))
    cards = card_additions(run, config, push_to_hub)
    if record is not None:
        return _replay(record, base, policy or [], out, device, overwrite, allow_nonfinite, cards, hub, as_json, quiet)
    from rewarded_lines.streaming.pool import use_wide_vectors

    use_wide_vectors()
    if from_mergekit is not None:
        how: dict[str, Any] = {
            "out": out,
            "device": device,
            "max_shard_size": max_shard_size,
            "overwrite": overwrite,
            "layers": layers,
        }
        how |= {"allow_nonfinite": allow_nonfinite, "additions": cards}
        results = merge_from_mergekit(from_mergekit, base, seed, dry_run, how, as_json, quiet)
        return _show(results, list(results[0].names), as_json, False, hub, quiet)
    from rewarded_lines.merging.merge import merge as run_merge

    base, policies = _inputs(base, policy or [], config)
    options = {"density": density, "scope": scope, "join": join, "seed": seed, "tall": tall, "agree": agree}
    with progress_bar("Merging", quiet=quiet or as_json, unit="byte") as bar:
        results = run_merge(
            base,
            policies,
            lam,
            alpha=_alpha(alpha),
            beta=beta,
            method=method,
            options={name: value for name, value in options.items() if value is not None},
            outside=outside,  # type: ignore[arg-type] # checked there
            score=score,
            out=out,
            dtype=dtype,
            device=device,
            max_shard_size=max_shard_size,
            overwrite=overwrite,
            dry_run=dry_run,
            layers=layers,
            extrapolate=extrapolate,
            allow_nonfinite=allow_nonfinite,
            as_=as_,
            additions=cards,
            progress=bar,
        )
    _show(results, list(policies), as_json, alpha == "auto", hub, quiet)


def _refuse_beside(ctx: typer.Context, option: str, does: str, allowed: set[str]) -> None:
    """A record or a file says all about a merge: what would say otherwise is refused, not ignored."""
    names = {name: _spelled(ctx, name) for name in ctx.params}
    given = [name for name in names if getattr(ctx.get_parameter_source(name), "name", "") == "COMMANDLINE"]
    wrong = [names[name] for name in given if name not in allowed]
    if wrong:
        raise fail(
            f"{option} {does}",
            where=", ".join(wrong),
            expected="beside it only "
            + ", ".join(names[name] for name in names if name in allowed and names[name] != option),
            remedy=f"leave these out, or merge without {option}",
        )


def _spelled(ctx: typer.Context, name: str) -> str:
    """Return an option as it is typed."""
    return next(param.opts[0] for param in ctx.command.params if param.name == name)


def _replay(
    record: Path,
    base: str | None,
    policy: list[str],
    out: Path | None,
    device: str,
    overwrite: bool,
    allow_nonfinite: bool,
    cards: Additions | None,
    hub: Destination | None,
    as_json: bool,
    quiet: bool,
) -> None:
    from rewarded_lines.streaming.pool import use_wide_vectors

    use_wide_vectors()
    from rewarded_lines.merging.merge import name_policies
    from rewarded_lines.merging.replay import replay

    with progress_bar("Merging", quiet=quiet or as_json, unit="byte") as bar:
        result = replay(
            record,
            base=base,
            policies=name_policies([_name(text) for text in policy]) if policy else {},
            out=out,
            device=device,
            overwrite=overwrite,
            allow_nonfinite=allow_nonfinite,
            additions=cards,
            progress=bar,
        )
    _show([result], list(result.names), as_json, False, hub, quiet)


def _show(
    results: list[MergeResult], names: list[str], as_json: bool, automatic: bool, hub: Destination | None, quiet: bool
) -> None:
    """Print what was merged, and upload it where that was asked for."""
    if not as_json:
        _print(results, names, automatic)
    out = results[0].out
    address = hub.push(out, quiet=quiet or as_json) if hub and out else ""
    if as_json:
        more = {"commit": address} if address else {}
        typer.echo(json.dumps([{**_as_dict(result, names), **more} for result in results], indent=2))
    elif address:
        # Never folded: it is for copying.
        Console().print(Text(address), soft_wrap=True)


def _alpha(text: str) -> Any:
    """Return the number, or "auto"."""
    try:
        return "auto" if text == "auto" else float(text)
    except ValueError as error:
        raise fail("not a number", where="--alpha", expected="a number, or auto", got=text) from error


def _inputs(base: str | None, policy: list[str], config: Path) -> tuple[str, Mapping[str, str]]:
    """Take base and policies from the command line, and from the project file what the command line leaves out."""
    from rewarded_lines.merging.merge import name_policies
    from rewarded_lines.projects import load_project

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
        **result.spec.as_dict(names),
        "tensors": result.tensors,
        "bytes": result.bytes,
        "scales": {stack: list(scales) for stack, scales in result.scales.items()},
        "notes": list(result.notes),
    }


def _plain(text: str) -> Text:
    """Return text in which brackets are brackets: names come from users and from files of others."""
    return Text(printable(text))


def _print(results: list[MergeResult], names: list[str], automatic: bool) -> None:
    console = Console(highlight=False)
    console.print("dry run: nothing written" if results[0].out is None else "merged", style="bold")
    console.print(_table(results, names, automatic))
    for note in results[0].notes:
        console.print(_plain(note), style="dim")
    for result in results:
        if result.out is not None:
            # Never folded: a path is for copying.
            console.print(_plain(str(result.out)), soft_wrap=True)


def _table(results: list[MergeResult], names: list[str], automatic: bool) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    chosen = ["α (auto)"] if automatic else []
    for heading in (*(f"λ {name}" for name in names), *chosen, "scale, first to last block", "size"):
        table.add_column(_plain(heading), overflow="fold", justify="right")
    for result in results:
        cells = (
            *(f"{weight:g}" for weight in result.spec.weights),
            *([f"{result.spec.alpha:.6g}"] if automatic else []),
            "; ".join(f"{scales[0]:g} to {scales[-1]:g}" for scales in result.scales.values()),
            f"{result.bytes / 1e6:,.1f} MB",
        )
        table.add_row(*map(_plain, cells))
    return table

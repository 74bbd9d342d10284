"""`rewarded-lines merge`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, make_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rewarded_lines.cli.display import progress_bar, show_json, show_line
from rewarded_lines.cli.parameters import AsJson, Quiet, as_option
from rewarded_lines.cli.push_command import MergePublishing, upload
from rewarded_lines.errors import fail, printable
from rewarded_lines.merger.merge_options import METHODS_PANEL, MergeOptions
from rewarded_lines.merger.methods import METHODS
from rewarded_lines.options import option, takes_fields

if TYPE_CHECKING:
    from rewarded_lines.merger.merge_outputs import MergeResult
    from rewarded_lines.merger.mergekit_methods import Translation

EPILOG = "\n\n".join(f"{name}: {row.summary}" for name, row in METHODS.items())
# Options that may stand beside --from: where the inputs are now, and how to write.
_WITH_RECORD = {"record", "base", "policy", "tokenizer", "out", "device", "overwrite", "rehash", "allow_nonfinite"}
_WITH_RECORD |= {"as_json", "quiet", "run", "push_to_hub", "private", "revision"}
# Options that may stand beside --from-mergekit.
_WITH_MERGEKIT = _WITH_RECORD - {"record", "policy"}
_WITH_MERGEKIT |= {"from_mergekit", "seed", "max_shard_size", "dry_run", "layers", "tower", "config_from"}
_FOR_MERGEKIT = {"out", "device", "max_shard_size", "overwrite", "dry_run", "layers", "tower", "allow_nonfinite"}
_FOR_MERGEKIT |= {"tokenizer", "config_from", "rehash", "additions", "progress"}


@dataclass(frozen=True)
class MergeSource:
    """What is merged: base, policies and weights, a project that names them, or a file that decides all."""

    base: str | None = option(None, "SFT model: folder or Hub id.")
    policy: list[str] | None = option(None, "A policy, \\[NAME=]FOLDER or Hub id; repeat for each.", show_default=False)
    lam: list[str] | None = option(
        None, "λ of the first of two policies, or weights 0.2,0.3,0.5; by default equal. Repeat for several outputs."
    )
    config: Path = option(Path("rewarded-lines.yaml"), "Project file with base and policies.")
    record: Path | None = option(
        None, "A merge.json: repeat that merge, bit for bit, from the same inputs.", flag="--from"
    )
    from_mergekit: Path | None = option(None, "A mergekit YAML: make its merge and print the command.")


def _method_options() -> type[Any]:
    """Return a dataclass with a field, None by default, for each option of the methods."""
    made = []
    for name in dict.fromkeys(name for row in METHODS.values() for name in row.options):
        takers = {method: row.options[name] for method, row in METHODS.items() if name in row.options}
        first = next(iter(takers.values()))
        about = ", ".join(f"{method} ({one.default})" for method, one in takers.items()) + f": {first.help}"
        choices = tuple(dict.fromkeys(choice for one in takers.values() for choice in one.choices))
        about += f": {' or '.join(choices)}." if choices else "."
        more = {"rich_help_panel": METHODS_PANEL, "show_default": False, "offers": choices}
        made.append((name, type(first.default) | None, option(None, about, **more)))
    return make_dataclass("MethodOptions", made, frozen=True)


MethodOptions = _method_options()


@takes_fields(MergeSource, "source", annotate=as_option)
@takes_fields(MergeOptions, "how", ("options", "mixtures", "additions", "progress"), as_option)
@takes_fields(MethodOptions, "options", annotate=as_option)
@takes_fields(MergePublishing, "publishing", annotate=as_option)
def merge(
    ctx: typer.Context,
    *,
    source: MergeSource,
    how: MergeOptions,
    options: Any,
    publishing: MergePublishing,
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
    rewarded-lines merge --preference helpful=0.7,brief=0.3
        by reward, where `mixtures:` says what each policy was trained for
    rewarded-lines merge --base sft --policy helpful=ppo-a \\
        --policy brief=ppo-b --lam 0.3 --out merged
    rewarded-lines merge --lam 0.25 --lam 0.5 --lam 0.75 --beta 0 --out soups
        three Rewarded Soups in soups/lam=0.25 …, each input read once
    rewarded-lines merge --base sft --policy tuned --alpha 0.3 --beta 0.7
        single-task LiNeS, against forgetting;
        --method wise-ft --lam 0.5 --beta 0 is WiSE-FT
    rewarded-lines merge --lam 0.5 --beta brief=0 --modules mlp=0.8
    rewarded-lines merge --lam 0.5 --schedule helpful=1,1,1.2,1.5
        schedules by policy, by block, by kind of module
    rewarded-lines merge --method ties --density 0.2 --alpha auto --lam 0.5
        TIES with LiNeS, α by the authors' heuristic, printed
    rewarded-lines merge --method greedy --score "python score.py {model}"
    rewarded-lines merge --base sft --policy lora-a --policy lora-b
        LoRA adapters (PEFT) give an adapter, exactly their weighted sum;
        --as full folds it into the base; of whole policies
        --as adapter --rank 64 gives the nearest adapter of that rank
    rewarded-lines merge --from merged/merge.json --out again
    rewarded-lines merge --from-mergekit config.yaml --out merged
        the same merge as mergekit's, or a refusal
    rewarded-lines merge --lam 0.3 --push-to-hub me/my-merge --private
        the token comes from HF_TOKEN or `hf auth login`
    """
    from rewarded_lines.hub.card_additions import card_additions

    _check_source(ctx, source)
    publishing.check(outputs=len(source.lam or how.preference or [""]))
    given = {name: value for name, value in vars(options).items() if value is not None}
    additions = card_additions(publishing.run, source.config, publishing.push_to_hub)
    with progress_bar("Merging", quiet=quiet or as_json, unit="byte") as bar:
        how = replace(how, alpha=parse_alpha(how.alpha), options=given, additions=additions, progress=bar)
        results, equal = _merged(source, how)
    if equal is not None:
        _show_equal(equal, str(how.out or results[0].out or "merged"), Console(stderr=as_json))
    _show(results, how.alpha == "auto", publishing, as_json, quiet)


def _show_equal(equal: Translation, out: str, console: Console) -> None:
    """Print the command that is equal to a mergekit file."""
    # Not folded, so that it can be copied.
    console.print(_plain(equal.command(out)), soft_wrap=True)
    for note in equal.notes:
        console.print(_plain(f"  {note}"))


def _check_source(ctx: typer.Context, source: MergeSource) -> None:
    """Refuse options whose values a record or a mergekit file decides."""
    files = {"--from": (source.record, _WITH_RECORD), "--from-mergekit": (source.from_mergekit, _WITH_MERGEKIT)}
    names = {str(param.name): param.opts[0] for param in ctx.command.params if param.name in ctx.params}
    given = [name for name in names if getattr(ctx.get_parameter_source(name), "name", "") == "COMMANDLINE"]
    for flag, (file, allowed) in files.items():
        if wrong := [names[name] for name in given if file is not None and name not in allowed]:
            beside = [option for name, option in names.items() if name in allowed and option != flag]
            raise fail(
                f"{flag} names a file that decides this",
                where=", ".join(wrong),
                expected=f"beside it only {', '.join(beside)}",
                remedy=f"leave these out, or merge without {flag}",
            )


def _merged(source: MergeSource, how: MergeOptions) -> tuple[list[MergeResult], Translation | None]:
    """Make the merges; of a mergekit file also return its translation."""
    from rewarded_lines.merger.merge import merge as run_merge
    from rewarded_lines.merger.merge import name_policies, replay

    if source.from_mergekit is not None:
        from rewarded_lines.merger.mergekit import merge_like_mergekit

        passed = {name: getattr(how, name) for name in _FOR_MERGEKIT}
        seed: Any = how.options.get("seed")
        asked, results = merge_like_mergekit(source.from_mergekit, base=source.base, seed=seed, **passed)
        return results, asked
    named = name_policies([_name(text) for text in source.policy]) if source.policy else {}
    if source.record is not None:
        return [replay(source.record, base=source.base, policies=named, how=how)], None
    base, policies, how = _inputs(source.base, named, source.config, how)
    return run_merge(base, policies, source.lam, how=how), None


def _inputs(
    base: str | None, named: Mapping[str, str], config: Path, how: MergeOptions
) -> tuple[str, Mapping[str, str], MergeOptions]:
    """Return base, policies and options; the project file fills what the command line leaves out."""
    if base and named and how.preference is None:
        return base, named, how
    from rewarded_lines.merger.preferences import read_mixtures
    from rewarded_lines.projects import load_project

    project = load_project(config)
    project.require(*([] if base else ["base"]), *([] if named else ["policies"]))
    base = base or project.resolve(str(project.config.base))
    carried: dict[str, Any] = {name: value for name, value in project.carried.items() if getattr(how, name) == "auto"}
    policies = named or {name: project.resolve(path) for name, path in project.config.policies.items()}
    if (shares := project.config.mixtures) and (not named or how.preference is not None):
        read_mixtures(shares, policies, project.where("mixtures"), project.config.rewards)
        carried["mixtures"] = shares
    return base, policies, replace(how, **carried)


def parse_alpha(texts: Any) -> Any:
    """Return what `merge` takes: "auto" stands alone."""
    return "auto" if texts == ["auto"] else texts


def _name(text: str) -> tuple[str, str]:
    name, separator, path = text.partition("=")
    return (name, path) if separator else (Path(text).name, text)


def _show(results: list[MergeResult], automatic: bool, to: MergePublishing, as_json: bool, quiet: bool) -> None:
    """Print what was merged, and upload it if the user asked for that."""
    if not as_json:
        _print(results, automatic)
    address, out = "", results[0].out
    if to.push_to_hub and out:
        address = upload(out, to.push_to_hub, to.private, to.revision, quiet or as_json)
    if as_json:
        more = {"commit": address} if address else {}
        show_json([{**_as_dict(result), **more} for result in results])
    elif address:
        show_line(address)


def _as_dict(result: MergeResult) -> dict[str, Any]:
    return {
        "out": str(result.out) if result.out else None,
        **result.spec.as_dict(result.names),
        "tensors": result.tensors,
        "bytes": result.bytes,
        "scales": {stack: list(scales) for stack, scales in result.scales.items()},
        "notes": list(result.notes),
        **({"preference": result.preference} if result.preference else {}),
        **({"kept": vars(result.kept)} if result.kept else {}),
    }


def _plain(text: str) -> Text:
    """Return text without markup or control characters: names may come from others' files."""
    return Text(printable(text))


def _print(results: list[MergeResult], automatic: bool) -> None:
    console = Console(highlight=False)
    console.print("dry run: nothing written" if results[0].out is None else "merged", style="bold")
    console.print(_table(results, automatic))
    for note in dict.fromkeys(note for result in results for note in result.notes):
        console.print(_plain(note), style="dim")
    for result in results:
        if result.out is not None:
            show_line(printable(str(result.out)))


def _table(results: list[MergeResult], automatic: bool) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    chosen = ["α (auto)"] if automatic else []
    asked = [f"μ {name}" for name in results[0].preference]
    for heading in (*asked, *(f"λ {name}" for name in results[0].names), *chosen, "scale, first to last block", "size"):
        table.add_column(_plain(heading), overflow="fold", justify="right")
    for result in results:
        cells = (
            *(f"{share:g}" for share in result.preference.values()),
            *(f"{weight:g}" for weight in result.spec.weights),
            *([f"{result.spec.alpha:.6g}"] if automatic else []),
            "; ".join(f"{scales[0]:g} to {scales[-1]:g}" for scales in result.scales.values()),
            f"{result.bytes / 1e6:,.1f} MB",
        )
        table.add_row(*map(_plain, cells))
    return table

"""The verb `merge`: base and policies in, a complete checkpoint folder for each λ out; `replay` repeats a merge."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from pathlib import Path

from rewarded_lines.checkpoints.reader import total_bytes
from rewarded_lines.checkpoints.writer import parse_size
from rewarded_lines.errors import Problem, UserError, fail, masked
from rewarded_lines.folders import atomic_folder, existing_output, write_json
from rewarded_lines.merger.greedy_soup import greedy_weights
from rewarded_lines.merger.input_cards import CARD_FILE
from rewarded_lines.merger.lines_schedule import check_schedule
from rewarded_lines.merger.methods import METHODS
from rewarded_lines.merger.model_card import CardAddition, model_card
from rewarded_lines.merger.open_inputs import plan_as
from rewarded_lines.merger.plan import OUTSIDE, Kept, Plan, choose
from rewarded_lines.merger.record import RECORD_FILE, describe, hash_inputs, read_record
from rewarded_lines.merger.spec import MergeOptions, MergeSpec, folder_name, parse_weights
from rewarded_lines.options import takes_fields

Policies = Mapping[str, str | Path] | Sequence[str | Path | tuple[str, str]]
Weights = float | str | Sequence[float]
Addition = Callable[[MergeSpec], CardAddition] | None
# The options that a record leaves open.
_REPLAYED = ("out", "device", "overwrite", "allow_nonfinite", "tokenizer", "additions", "progress")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class MergeResult:
    """One merged policy: its folder (None after a dry run) and the merge that made it."""

    out: Path | None
    spec: MergeSpec
    names: Sequence[str]
    tensors: int
    bytes: int
    scales: Mapping[str, Sequence[float]]
    notes: Sequence[str] = ()
    kept: Kept | None = None


@takes_fields(MergeOptions, "how")
def merge(
    base: str | Path, policies: Policies, lam: Weights | Sequence[Weights] | None = None, *, how: MergeOptions
) -> list[MergeResult]:
    """Merge policies over their SFT base: θ_base + λ^(ℓ)·m(τ_1 … τ_N; λ), streamed block by block.

    τ_i = θ_i − θ_base is the residual of policy i, λ^(ℓ) = α + β·(ℓ−1)/(L−1) the LiNeS scale of block ℓ, and m the
    method, by default Σ λ_i·τ_i.

    Args:
        base: folder or Hub id of the SFT model.
        policies: folders or Hub ids, by name or as a list (named after their folders).
        lam: λ of the first of two policies, or a weight for each; a list of such for several outputs. The default is
            0.5, for a single policy 1.
        how: the fields of `MergeOptions`, each by its name, as in `alpha=0.5, method="ties"`.

    Returns:
        One result per λ, in order.

    Raises:
        UserError: every fault of the inputs, before anything is written.
    """
    named = name_policies(policies)
    base = expand(base)
    choose("--outside", how.outside, OUTSIDE)
    check_schedule(0.0 if how.alpha == "auto" else how.alpha, how.beta)
    specs = _specs(lam, list(named), how)
    parse_size(how.max_shard_size)
    targets = _targets(None if how.out is None else Path(expand(how.out)), specs)
    _check_targets(targets, [base, *named.values()], how.overwrite)
    plan = _open(base, named, how)
    addition = how.additions(plan) if how.additions else None
    if how.method == "greedy" and how.dry_run:
        plan.notes.append("dry run: no candidate is scored, so who joins is not known")
    elif how.method == "greedy":
        specs = [replace(specs[0], weights=greedy_weights(plan, specs[0], targets[0], how))]
    if how.alpha == "auto":
        how.progress.start("choosing α")
        specs = [replace(spec, alpha=value) for spec, value in zip(specs, plan.auto_alpha(specs), strict=True)]
    if how.dry_run:
        return [_result(plan, spec, None) for spec in specs]
    return _write(plan, specs, targets, how, addition)


@takes_fields(MergeOptions, "how", [one.name for one in fields(MergeOptions) if one.name not in _REPLAYED])
def replay(
    record: str | Path,
    *,
    base: str | None = None,
    policies: Mapping[str, str] | None = None,
    how: MergeOptions,
) -> MergeResult:
    """Repeat the merge that a `merge.json` records; its hashes prove that the inputs, and so the bits, are the same.

    Args:
        record: the file, or the merged folder that contains it.
        base: where the base is now, if it has moved.
        policies: where policies are now, by name, if they have moved.
        how: `device`, `overwrite`, `allow_nonfinite`, `additions` and `progress` as in `merge`; every device makes the
            same bits. `tokenizer` is where a folder with the tokenizer is now, if it has moved. `out` is by default
            FOLDER-again, beside the record's FOLDER. The record decides the rest.

    Raises:
        UserError: the record is damaged, an input has changed, or any fault that `merge` refuses.
    """
    path = Path(record).expanduser()
    path = path / RECORD_FILE if path.is_dir() else path
    recorded = read_record(path)
    if strange := [name for name in policies or {} if name not in recorded.policies]:
        what, known = f"the record has no policy `{strange[0]}`", ", ".join(recorded.policies)
        raise fail(what, where="--policy", expected=known, got=", ".join(strange))
    check_schedule(recorded.alpha, recorded.beta)
    moved = {name: expand(reference) for name, reference in (policies or {}).items()}
    named = {name: source.path for name, source in recorded.policies.items()} | moved
    folder = path.resolve().parent
    target = folder.with_name(f"{folder.name}-again") if how.out is None else Path(expand(how.out))
    origin = expand(base or recorded.base.path)
    _check_targets([target], [origin, *named.values()], how.overwrite)
    size = recorded.max_shard_size
    parse_size(size)
    how = replace(how, as_=recorded.kind, rank=recorded.rank, dtype=recorded.dtype, max_shard_size=size)
    tokenizer, config_from = recorded.carried(how.tokenizer)
    how = replace(how, layers=recorded.layers, tower=recorded.tower, tokenizer=tokenizer, config_from=config_from)
    spec = recorded.merge.complete(len(named))
    plan = _open(origin, named, replace(how, method=recorded.method))
    plan.carried = replace(plan.carried, asked=recorded.chosen)
    how.progress.start("hashing inputs")
    recorded.check_inputs(path, plan)
    return _write(plan, [spec], [target], how, how.additions(plan) if how.additions else None)[0]


def _open(base: str, policies: Mapping[str, str], how: MergeOptions) -> Plan:
    how.progress.start("opening inputs")
    taken = ("dtype", "device", "layers", "tower", "tokenizer", "config_from", "rank")
    return plan_as(how.as_, base, policies, how.method, **{name: getattr(how, name) for name in taken})


def _write(
    plan: Plan, specs: Sequence[MergeSpec], targets: Sequence[Path], how: MergeOptions, addition: Addition
) -> list[MergeResult]:
    """Write one complete folder for each spec, or none; inputs are read once for all."""
    how.progress.start("measuring residuals")
    plan.prepare(specs)
    needed = sum(total_bytes(plan.outputs(spec)) for spec in specs)
    try:
        with ExitStack() as stack:
            folders = [stack.enter_context(atomic_folder(target, how.overwrite)) for target in targets]
            if needed > shutil.disk_usage(folders[0]).free:
                raise _full(needed, folders[0].parent)
            _fill(plan, specs, folders, how, addition)
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise _full(needed, targets[0].parent) from error
    return [_result(plan, spec, target) for spec, target in zip(specs, targets, strict=True)]


def _fill(
    plan: Plan, specs: Sequence[MergeSpec], folders: Sequence[Path], how: MergeOptions, addition: Addition
) -> None:
    """Write weights, settings, `merge.json` and the model card of every output."""
    nonfinite = plan.write(specs, folders, parse_size(how.max_shard_size), how.progress)
    if not how.allow_nonfinite:
        nonfinite.refuse()
    how.progress.start("hashing inputs")
    inputs = hash_inputs(plan)
    settings = {
        **{"as": plan.kind, "dtype": how.dtype, "max_shard_size": how.max_shard_size},
        **{"layers": how.layers, "tower": how.tower},
        **({} if how.rank is None else {"rank": how.rank}),
        **{"tokenizer": plan.carried.tokenizer, "config_from": plan.carried.config_from},
        "chosen": dict(plan.carried.asked),
        # `--score` may contain an access token.
        "command": [Path(sys.argv[0]).name, *map(masked, sys.argv[1:])],
    }
    for folder, spec in zip(folders, specs, strict=True):
        write_json(folder / RECORD_FILE, describe(plan, spec, inputs, settings))
        added = addition(spec) if addition else CardAddition()
        for name, content in added.files.items():
            (folder / name).write_bytes(content)
        (folder / CARD_FILE).write_text(model_card(plan, spec, settings, added), encoding="utf-8")
    how.progress.start("syncing to disk")


def _full(needed: int, place: Path) -> UserError:
    free = shutil.disk_usage(place).free
    return fail(
        "not enough disk space, or a limit on the size of files",
        where=str(place),
        expected=f"{needed:,} bytes ({needed / 1e9:.2f} GB) free",
        got=f"{free:,} bytes ({free / 1e9:.2f} GB)",
        remedy="choose another --out, fewer λ, or --dtype bfloat16",
    )


def _result(plan: Plan, spec: MergeSpec, out: Path | None) -> MergeResult:
    outputs, kept = plan.outputs(spec), plan.kept(spec)
    names, notes = tuple(plan.policies), (*plan.notes, *([kept.sentence()] if kept else []))
    return MergeResult(out, spec, names, len(outputs), total_bytes(outputs), plan.scales(spec), notes, kept)


def name_policies(policies: Policies) -> dict[str, str]:
    """Return policies by name; in a sequence, pairs are (name, folder), and a bare folder is named after itself."""
    given = policies.items() if isinstance(policies, Mapping) else policies
    pairs = [item if isinstance(item, tuple) else (Path(item).name, item) for item in given]
    named = {name: expand(path) for name, path in pairs}
    if not named:
        raise fail("no policy given", where="--policy", expected="at least one, as NAME=FOLDER or FOLDER")
    if len(named) < len(policies):
        names = ", ".join(named)
        raise fail("two policies share a name", where="--policy", got=names, remedy="name them: NAME=FOLDER")
    return named


def expand(reference: str | Path) -> str:
    """Return a path as text with `~` expanded, which shells do not expand after `--base=` and `NAME=`."""
    return str(Path(reference).expanduser()) if str(reference).startswith("~") else str(reference)


def _specs(lam: Weights | Sequence[Weights] | None, names: Sequence[str], how: MergeOptions) -> list[MergeSpec]:
    """Return the spec of every output; an α that is chosen later is 0 until then."""
    alpha = 0.0 if how.alpha == "auto" else how.alpha
    first = MergeSpec((), alpha, how.beta, how.method, how.options or {}, how.outside).complete(len(names))
    kind = METHODS[how.method].weights
    if kind == "none":
        if lam is not None:
            what = f"the method {how.method} sets the weights itself"
            raise fail(what, where="--lam", got=str(lam), remedy="leave it out")
        return [replace(first, weights=(1 / len(names),) * len(names))]
    default: Weights = 1.0 if len(names) == 1 else 0.5
    free = how.extrapolate or kind == "free"
    found = _each_weights(default if lam is None else lam, names, free, total=kind == "simplex")
    return [replace(first, weights=weights) for weights in found]


def _each_weights(
    lam: Weights | Sequence[Weights], names: Sequence[str], free: bool, total: bool
) -> list[tuple[float, ...]]:
    if isinstance(lam, float | int | str) or all(isinstance(value, float | int) for value in lam):
        return [parse_weights(lam, names, free, total)]  # type: ignore[arg-type]
    found = [_each_weights(value, names, free, total)[0] for value in lam]
    if len(set(found)) < len(found):
        raise fail("the same λ twice", where="--lam", got=", ".join(map(str, found)))
    return found


def _targets(out: Path | None, specs: Sequence[MergeSpec]) -> list[Path]:
    parent = Path("merged") if out is None else out
    if out is not None and len(specs) == 1:
        return [parent]
    if METHODS[specs[0].method].weights == "none":
        return [parent / specs[0].method]
    return [parent / folder_name(spec.weights) for spec in specs]


def _check_targets(targets: Sequence[Path], inputs: Sequence[str], overwrite: bool) -> None:
    """Refuse outputs that exist, or that lie in, on or around an input."""
    problems = [problem for target in targets for problem in existing_output(target, overwrite, RECORD_FILE)]
    problems += [
        Problem("two outputs would have the same name", str(target), remedy="name λ that differ in six digits")
        for target in dict.fromkeys(target for target in targets if targets.count(target) > 1)
    ]
    read = [Path(reference).resolve() for reference in inputs if Path(reference).exists()]
    for target in targets:
        # Path.resolve would raise on links that form a circle.
        place = Path(os.path.realpath(target))
        touched = [path for path in read if path == place or place in path.parents or path in place.parents]
        problems += [
            Problem("the output lies in, on or around an input", where=str(target), got=str(path)) for path in touched
        ]
    if problems:
        raise UserError(problems)

"""The verb `merge`: base and policies in, a complete checkpoint folder for each λ out; `replay` repeats a merge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path

from rewarded_lines.checkpoints.hashing import KNOWN
from rewarded_lines.checkpoints.writer import parse_size
from rewarded_lines.errors import fail
from rewarded_lines.merger.greedy_soup import greedy_weights
from rewarded_lines.merger.merge_options import MergeOptions
from rewarded_lines.merger.merge_outputs import MergeResult, check_targets, result_of, write_outputs
from rewarded_lines.merger.methods import METHODS
from rewarded_lines.merger.open_inputs import plan_as
from rewarded_lines.merger.plan import OUTSIDE, Plan, choose
from rewarded_lines.merger.preferences import Weights, check_trained, each_weights, preferred_weights, read_mixtures
from rewarded_lines.merger.record import RECORD_FILE, read_record
from rewarded_lines.merger.schedule_forms import FORMS, read_schedule
from rewarded_lines.merger.spec import MergeSpec, folder_name
from rewarded_lines.options import takes_fields

Policies = Mapping[str, str | Path] | Sequence[str | Path | tuple[str, str]]
# The options that a record leaves open.
_REPLAYED = ("out", "device", "overwrite", "rehash", "allow_nonfinite", "tokenizer", "additions", "progress")


@takes_fields(MergeOptions, "how")
def merge(
    base: str | Path, policies: Policies, lam: Weights | Sequence[Weights] | None = None, *, how: MergeOptions
) -> list[MergeResult]:
    """Merge policies over their SFT base: θ_base + λ^(ℓ)·m(τ_1 … τ_N; λ), streamed block by block.

    τ_i = θ_i − θ_base is the residual of policy i, λ^(ℓ) = α + β·(ℓ−1)/(L−1) the LiNeS scale of block ℓ, and m the
    method, by default Σ λ_i·τ_i. Policies may have schedules s_i of their own in linear methods: Σ λ_i·s_i^(ℓ)·τ_i.

    Args:
        base: folder or Hub id of the SFT model.
        policies: folders or Hub ids, by name or as a list (named after their folders).
        lam: λ of the first of two policies, or a weight for each; a list of such for several outputs. By default
            all weights are equal, with the sum 1.
        how: the fields of `MergeOptions`, each by its name, as in `alpha=0.5, method="ties"`.

    Returns:
        One result per λ, in order.

    Raises:
        UserError: every fault of the inputs, before anything is written.
    """
    named = name_policies(policies)
    base = expand(base)
    choose("--outside", how.outside, OUTSIDE)
    specs = _specs(lam, list(named), how)
    parse_size(how.max_shard_size)
    targets = _targets(None if how.out is None else Path(expand(how.out)), specs)
    check_targets(targets, [base, *named.values()], how.overwrite)
    plan = _open(base, named, how)
    _check_specs(plan, specs, how)
    addition = how.additions(plan) if how.additions else None
    if how.method == "greedy" and how.dry_run:
        plan.notes.append("dry run: no candidate is scored, so who joins is not known")
    elif how.method == "greedy":
        specs = [replace(specs[0], weights=greedy_weights(plan, specs[0], targets[0], how))]
    if how.alpha == "auto":
        how.progress.start("choosing α")
        specs = [replace(spec, alpha=value) for spec, value in zip(specs, plan.auto_alpha(specs), strict=True)]
    if how.dry_run:
        return [result_of(plan, spec, None, how) for spec in specs]
    return write_outputs(plan, specs, targets, how, addition)


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
        how: `device`, `overwrite`, `rehash`, `allow_nonfinite`, `additions` and `progress` as in `merge`; every device
            makes the same bits. `tokenizer` is where a folder with the tokenizer is now, if it has moved. `out` is by
            default FOLDER-again, beside the record's FOLDER. The record decides the rest.

    Raises:
        UserError: the record is damaged, an input has changed, or any fault that `merge` refuses.
    """
    path = Path(record).expanduser()
    path = path / RECORD_FILE if path.is_dir() else path
    recorded = read_record(path)
    if strange := [name for name in policies or {} if name not in recorded.policies]:
        what, known = f"the record has no policy `{strange[0]}`", ", ".join(recorded.policies)
        raise fail(what, where="--policy", expected=known, got=", ".join(strange))
    moved = {name: expand(reference) for name, reference in (policies or {}).items()}
    named = {name: source.path for name, source in recorded.policies.items()} | moved
    folder = path.resolve().parent
    target = folder.with_name(f"{folder.name}-again") if how.out is None else Path(expand(how.out))
    origin = expand(base or recorded.base.path)
    check_targets([target], [origin, *named.values()], how.overwrite)
    size = recorded.max_shard_size
    parse_size(size)
    how = replace(how, as_=recorded.kind, rank=recorded.rank, dtype=recorded.dtype, max_shard_size=size)
    how = replace(how, mixtures=recorded.mixtures)
    tokenizer, config_from = recorded.carried(how.tokenizer)
    how = replace(how, layers=recorded.layers, tower=recorded.tower, tokenizer=tokenizer, config_from=config_from)
    spec = recorded.merge.complete(len(named))
    plan = _open(origin, named, replace(how, method=recorded.method))
    plan.check_schedule(spec)
    plan.carried = replace(plan.carried, asked=recorded.chosen)
    how.progress.start("hashing inputs")
    recorded.check_inputs(path, plan)
    return write_outputs(plan, [spec], [target], how, how.additions(plan) if how.additions else None)[0]


def _open(base: str, policies: Mapping[str, str], how: MergeOptions) -> Plan:
    how.progress.start("opening inputs")
    KNOWN.trust(not how.rehash)
    taken = ("dtype", "device", "layers", "tower", "tokenizer", "config_from", "rank")
    return plan_as(how.as_, base, policies, how.method, **{name: getattr(how, name) for name in taken})


def _check_specs(plan: Plan, specs: Sequence[MergeSpec], how: MergeOptions) -> None:
    """Refuse what does not fit the opened inputs, and note preferences whose weights leave the simplex."""
    plan.check_schedule(specs[0])
    if how.mixtures:
        check_trained(how.mixtures, {name: policy.folder for name, policy in plan.policies.items()})
    if how.mixtures and how.preference is not None:
        plan.notes += read_mixtures(how.mixtures, plan.policies).notes(spec.weights for spec in specs)


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
    given = {form: getattr(how, form) for form in FORMS}
    schedule = read_schedule(names, **given | ({"alpha": 0.0} if how.alpha == "auto" else {}), root=Path())
    first = MergeSpec((), method=how.method, options=how.options or {}, outside=how.outside, **schedule)
    first = first.complete(len(names))
    if how.alpha == "auto" and first.lines:
        raise fail(
            "auto chooses one α for all policies",
            where="--alpha auto",
            expected="beside it one --beta, and no --schedule",
            got=first.schedule.text(names),
            remedy="give numbers for α, or one β",
        )
    kind = METHODS[how.method].weights
    mixtures = read_mixtures(how.mixtures, names) if how.mixtures else None
    if kind == "none":
        if (asked := how.preference if lam is None else lam) is not None:
            what = f"the method {how.method} sets the weights itself"
            raise fail(what, where="--lam" if asked is lam else "--preference", got=str(asked), remedy="leave it out")
        return [replace(first, weights=(1 / len(names),) * len(names))]
    if how.preference is not None:
        return [replace(first, weights=weights) for weights in preferred_weights(lam, mixtures, how)]
    default: Weights = (1 / len(names),) * len(names)
    free = how.extrapolate or kind == "free"
    found = each_weights(default if lam is None else lam, names, free, total=kind == "simplex")
    return [replace(first, weights=weights) for weights in found]


def _targets(out: Path | None, specs: Sequence[MergeSpec]) -> list[Path]:
    parent = Path("merged") if out is None else out
    if out is not None and len(specs) == 1:
        return [parent]
    if METHODS[specs[0].method].weights == "none":
        return [parent / specs[0].method]
    return [parent / folder_name(spec.weights) for spec in specs]

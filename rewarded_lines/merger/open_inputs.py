"""From folders and Hub ids to a plan: open the inputs, separate whole models from adapters, check them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rewarded_lines.checkpoints.adapters import Adapter, BareBase, bare_base, is_adapter, names_adapter
from rewarded_lines.checkpoints.reader import Checkpoint, open_checkpoint, resolve_folder
from rewarded_lines.checkpoints.tensor_depth import Depths, with_declared_blocks
from rewarded_lines.errors import Problem, UserError, fail
from rewarded_lines.merger.adapter_checks import KEEP_APART, check_adapters, notes_on
from rewarded_lines.merger.adapter_plan import AdapterPlan
from rewarded_lines.merger.carried_files import choose_files
from rewarded_lines.merger.carried_settings import AUTO
from rewarded_lines.merger.input_names import depths_of, under_base_names
from rewarded_lines.merger.low_rank_plan import LowRankPlan
from rewarded_lines.merger.merge_device import check_device
from rewarded_lines.merger.methods import METHODS
from rewarded_lines.merger.model_checks import check, some
from rewarded_lines.merger.model_plan import ModelPlan
from rewarded_lines.merger.plan import DTYPES, Plan, choose
from rewarded_lines.merger.tied_embeddings import changed_tensors, enlarge, name_apart, settle

KINDS = ("auto", "full", "adapter")
_RANK = "pass --as full, or --rank 64 for the nearest adapter of that rank"


def plan_as(
    kind: str,
    base: str,
    policies: Mapping[str, str],
    method: str,
    *,
    device: str = "cpu",
    rank: int | None = None,
    **how: Any,
) -> Plan:
    """Return the plan of a merge into whole models ("full") or into adapters ("adapter"); refuse all faults at once.

    "auto" means adapters if all policies are adapters. Only weighted sums give exact ones. With a `rank`, "adapter"
    takes whole policies and any method, and keeps what that rank can hold. `how` are arguments of `plan_merge`.
    """
    choose("--as", kind, KINDS)
    if rank is not None and kind != "adapter":
        what = "a rank is that of an adapter"
        raise fail(what, where=f"--rank {rank}", got=f"--as {kind}", remedy="pass --as adapter, or leave --rank out")
    if kind == "full" or (kind == "auto" and not all(map(names_adapter, policies.values()))):
        return plan_merge(base, policies, device=device, **how)
    if device not in ("cpu", "auto"):
        what, remedy = "adapters are computed on the CPU", "leave --device out, or pass --as full"
        raise fail(what, where=f"--device {device}", got=f"--as {kind}", remedy=remedy)
    if rank is not None:
        return LowRankPlan(plan_merge(base, policies, **how), rank)
    sums = [name for name, row in METHODS.items() if row.sums]
    if method not in sums:
        raise fail(
            f"the method {method} gives no adapter: its residual is no weighted sum",
            where="--as",
            expected=f"with adapters as policies one of {', '.join(sums)}",
            remedy="pass --as full to fold the adapters into the base and merge whole models; "
            "or --as adapter --rank 64 for the nearest adapter",
        )
    return plan_adapters(base, policies, **how)


def plan_merge(
    base: str,
    policies: Mapping[str, str],
    *,
    dtype: str = "auto",
    device: str = "cpu",
    layers: str | None = None,
    tower: str | None = None,
    tokenizer: str = AUTO,
    config_from: str = AUTO,
) -> ModelPlan:
    """Open base and policies, check that they fit together, and find every tensor's depth.

    Args:
        base: folder or Hub id.
        policies: likewise, by name.
        dtype: one of `DTYPES`.
        device: computes the merge; see `check_device`.
        layers: the pattern of the block list, for unknown layouts.
        tower: what becomes of other lists, e.g. `vision=flat`; see `find_depths`.
        tokenizer: whose tokenizer the output gets; see `choose_files`.
        config_from: likewise whose generation settings.
    """
    choose("--dtype", dtype, DTYPES)
    check_device(device)
    problems: list[Problem] = []
    origin, opened, names, notes = open_whole(base, policies, problems)
    with collected(problems):
        carried = choose_files(origin, opened, tokenizer, config_from)
    if problems:
        raise UserError(problems)
    depths = depths_of(names, origin.config, layers, tower)
    plan = ModelPlan(origin, opened, names, depths, dtype, device)
    plan.carried = carried
    plan.notes += [*notes, *carried.notes, *_on_depth(depths, names)]
    plan.reference, plan.references, plan.layers, plan.tower = base, dict(policies), layers, tower
    return plan


def open_whole(
    base: str, policies: Mapping[str, str], problems: list[Problem]
) -> tuple[Checkpoint, dict[str, Checkpoint | Adapter], list[str], list[str]]:
    """Return base, policies by name, the tensors that they share, and notes; add what does not fit to `problems`.

    Raises:
        UserError: an input cannot be opened.
    """
    with collected(problems):
        origin = open_checkpoint(base, "base")
    opened = _open_policies(policies, problems)
    if problems:
        raise UserError(problems)
    names, notes = list[str](), under_base_names(origin, opened)
    with collected(problems):
        names, more = _check_fit(origin, base, opened)
        notes += more
    return origin, opened, names, notes


def plan_adapters(
    base: str,
    policies: Mapping[str, str],
    *,
    dtype: str = "auto",
    layers: str | None = None,
    tower: str | None = None,
    tokenizer: str = AUTO,
    config_from: str = AUTO,
) -> AdapterPlan:
    """Open base and adapters, check that they fit together, and find the depth of every module; see `plan_merge`.

    A base with only its config.json is enough, unless policies save tensors whole.
    """
    choose("--dtype", dtype, DTYPES)
    problems: list[Problem] = []
    whole, adapters = _separated(_open_policies(policies, problems))
    what = "a whole model: no adapter can store all of its difference from the base"
    problems += [Problem(what, f"policy `{name}` ({policies[name]})", remedy=_RANK) for name in whole]
    with collected(problems):
        origin = _open_base(base, any(adapter.saved or adapter.rows for adapter in adapters.values()))
        renamed = under_base_names(origin, adapters)
        renamed += enlarge(origin, adapters)
        if isinstance(origin, Checkpoint):
            name_apart(origin, adapters.values())
        problems += check_adapters(origin, base, adapters, folded=False)
        carried = choose_files(origin, adapters, tokenizer, config_from, adapter=True)
    if problems:
        raise UserError(problems)
    names = dict.fromkeys(module.tensor for adapter in adapters.values() for module in adapter.modules.values())
    names |= dict.fromkeys(name for adapter in adapters.values() for name in [*adapter.saved, *adapter.rows])
    apart = {
        module.tensor: module.parts[0]
        for adapter in adapters.values()
        for module in adapter.modules.values()
        if module.parts
    }
    known = [*origin.tensors, *(name for name in names if name not in origin.tensors and name not in apart)]
    known = with_declared_blocks(known, origin.config, layers, tower) if isinstance(origin, BareBase) else known
    depths = depths_of(known, origin.config, layers, tower)
    # Fused experts lie where the base's tensors of each expert lie.
    place = {**depths.place, **{name: depths.place[part] for name, part in apart.items()}}
    plan = AdapterPlan(origin, adapters, Depths(place, depths.stacks), dtype)
    plan.carried = carried
    plan.notes += [*renamed, *notes_on(origin, base, adapters), *carried.notes, *_on_depth(plan.depths, names)]
    plan.reference, plan.references, plan.layers, plan.tower = base, dict(policies), layers, tower
    return plan


def _on_depth(depths: Depths, names: Iterable[str]) -> list[str]:
    """Return notes on the merged tensors that get no scale by depth, apart from embeddings, norms and heads."""
    sides = {"unknown": "outside the known blocks, so scaled by α", "flat": "scaled by α", "base": "kept from the base"}
    found = {side: [name for name in names if depths.place[name].side == side] for side in sides}
    return [f"{what}: {some(found[side])}" for side, what in sides.items() if found[side]]


def _open_policies(policies: Mapping[str, str], problems: list[Problem]) -> dict[str, Checkpoint | Adapter]:
    """Open policies, whole models or adapters; add their faults to `problems`."""
    opened: dict[str, Checkpoint | Adapter] = {}
    for name, reference in policies.items():
        with collected(problems):
            folder, title = resolve_folder(reference), f"policy `{name}`"
            opened[name] = Adapter(folder, title) if is_adapter(folder) else Checkpoint(folder, title)
    return opened


def _separated(policies: Mapping[str, Checkpoint | Adapter]) -> tuple[dict[str, Checkpoint], dict[str, Adapter]]:
    whole = {name: policy for name, policy in policies.items() if isinstance(policy, Checkpoint)}
    return whole, {name: policy for name, policy in policies.items() if isinstance(policy, Adapter)}


def _open_base(reference: str, weights: bool) -> Checkpoint | BareBase:
    """Open the base of adapters; from the Hub its weights are only fetched if `weights` is true."""
    folder = resolve_folder(reference, weights)
    # Without weights, the Hub's index of shards may be here without the shards.
    fetched = weights or Path(reference).is_dir()
    return bare_base(folder, fetched) or Checkpoint(folder, "base")


def _check_fit(
    base: Checkpoint, reference: str, policies: Mapping[str, Checkpoint | Adapter]
) -> tuple[list[str], list[str]]:
    """Return the tensors to merge into whole models, and notes; refuse policies that do not fit."""
    whole, adapters = _separated(policies)
    problems: list[Problem] = []
    with collected(problems):
        untied = [*(enlarge(base, adapters) if not whole else []), *settle(base, policies)]
        names, notes = check(base, whole)
        notes = untied + notes
    if not adapters and not problems:
        return names, notes
    problems += check_adapters(base, reference, adapters, folded=True)
    if problems:
        raise UserError(problems)
    # A second copy of tied embeddings is not merged, so an adapter's change to it would be lost.
    merged, what = set(names), "the adapter changes a copy of another tensor, and copies are not merged"
    problems = [
        Problem(what, f"policy `{name}`: {tensor}", remedy=KEEP_APART)
        for name, adapter in adapters.items()
        for tensor in changed_tensors(adapter)
        if tensor not in merged
    ]
    if problems:
        raise UserError(problems)
    return names, notes + notes_on(base, reference, adapters)


@contextmanager
def collected(problems: list[Problem]) -> Iterator[None]:
    """Add the problems of a `UserError` to a list instead of raising."""
    try:
        yield
    except UserError as error:
        problems += error.problems

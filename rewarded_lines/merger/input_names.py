"""All inputs under the base's names, and what policies lack although they were trained from it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rewarded_lines.checkpoints.adapters import Adapter, BareBase
from rewarded_lines.checkpoints.reader import Checkpoint
from rewarded_lines.checkpoints.tensor_depth import Depths, Place, find_depths
from rewarded_lines.checkpoints.tensor_names import (
    in_shapes_of,
    names_in,
    never_loaded,
    of_towers,
    predicts_further,
    same_modules,
    under_names_of,
)
from rewarded_lines.merger.config_checks import is_text_of
from rewarded_lines.merger.model_checks import some


def under_base_names(base: Checkpoint | BareBase, policies: Mapping[str, Checkpoint | Adapter]) -> list[str]:
    """Give the tensors of all policies the base's names, and return notes.

    Tensors that transformers never loads, and towers in front of a text model, are the base's where a policy lacks
    them: their residual is zero. What means no tensor of the base keeps its name, for the checks to refuse.
    """
    notes = []
    for name, policy in policies.items():
        if isinstance(policy, Checkpoint) and isinstance(base, Checkpoint):
            notes += _rename(base, policy, name) + _fill(base, policy, name)
        elif isinstance(policy, Adapter) and isinstance(base, Checkpoint):
            named = names_in(base.tensors, policy.targets())
            notes += _renamed(name, {mine: theirs for mine, theirs in named.items() if mine != theirs})
            policy.rename(named)
            policy.find_parts(base.tensors)
    adapters = [policy for policy in policies.values() if isinstance(policy, Adapter)]
    for adapter, modules in zip(adapters, same_modules([list(one.modules) for one in adapters]), strict=True):
        adapter.rename_modules(modules)
    sources = [("base", base), *((f"policy `{name}`", policy) for name, policy in policies.items())]
    for title, source in sources:
        if isinstance(source, Checkpoint) and source.absent:
            notes.append(f"the index of {title} lists tensors that no file has: {some(source.absent)}")
    return notes


def depths_of(
    names: Iterable[str], config: Mapping[str, Any], layers: str | None = None, tower: str | None = None
) -> Depths:
    """Return the place of every tensor; blocks that predict further tokens run after the last block, as a head does."""
    names = list(names)
    further = predicts_further(names, config)
    depths = find_depths([name for name in names if name not in further], config, layers, tower)
    stack, blocks = list(depths.stacks.items())[-1]
    after = Place(stack, None, blocks, "after")
    return Depths({**depths.place, **dict.fromkeys(sorted(further), after)}, depths.stacks)


def _rename(base: Checkpoint, policy: Checkpoint, name: str) -> list[str]:
    own = policy.tensors
    policy.tensors = in_shapes_of(base.tensors, under_names_of(base.tensors, own), base.config)
    starts = {(info.file, info.start): each for each, info in own.items() if each not in policy.tensors}
    # A tensor that is cut stands for its first part, and one that is joined has the name of its first piece.
    firsts = ((each, (info.pieces or (info,))[0]) for each, info in policy.tensors.items() if each not in own)
    return _renamed(name, {starts[key]: each for each, info in firsts if (key := (info.file, info.start)) in starts})


def _renamed(name: str, found: Mapping[str, str]) -> list[str]:
    if not found:
        return []
    mine, theirs = next(iter(found.items()))
    return [f"policy `{name}` has other names for {len(found)} tensors: {mine} is the base's {theirs}"]


def _fill(base: Checkpoint, policy: Checkpoint, name: str) -> list[str]:
    """Drop what transformers never loads and the base lacks; hold the base's tensors that the policy cannot have."""
    notes = []
    added = [each for each in policy.tensors if each not in base.tensors]
    if surplus := never_loaded(added, policy.config):
        policy.tensors = {each: info for each, info in policy.tensors.items() if each not in surplus}
        listed = some(each for each in added if each in surplus)
        notes.append(f"left out: {listed} of policy `{name}`, which transformers loads in no model")
    lacking = [each for each in base.tensors if each not in policy.tensors]
    unloaded = never_loaded(lacking, base.config)
    towers = of_towers(lacking) - unloaded if is_text_of(policy.config, base.config) else set[str]()
    reasons = {"transformers loads them in no model": unloaded, "it is a model of text only": towers}
    for reason, group in reasons.items():
        if held := [each for each in lacking if each in group]:
            notes.append(f"kept from the base: {some(held)}; policy `{name}` lacks them: {reason}")
            policy.hold(base, held)
    return notes

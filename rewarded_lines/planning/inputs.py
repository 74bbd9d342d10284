"""The inputs of a merge: opened, told apart (whole models, adapters), and checked against one another."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rewarded_lines.checkpoints.adapters import Adapter, BareBase, bare_base, is_adapter
from rewarded_lines.checkpoints.reader import Checkpoint, open_checkpoint, resolve_folder
from rewarded_lines.errors import Problem, UserError
from rewarded_lines.planning.adapter_compatibility import check_adapters, notes_on
from rewarded_lines.planning.compatibility import Fitting, check


def open_inputs(base: str, policies: Mapping[str, str]) -> tuple[Checkpoint, dict[str, Checkpoint | Adapter]]:
    """Open a base and its policies, whole models or adapters.

    Raises:
        UserError: with everything that is wrong with any of them.
    """
    problems: list[Problem] = []
    try:
        origin = open_checkpoint(base, "base")
    except UserError as error:
        problems += error.problems
    opened = open_policies(policies, problems)
    if problems:
        raise UserError(problems)
    return origin, opened


def open_policies(policies: Mapping[str, str], problems: list[Problem]) -> dict[str, Checkpoint | Adapter]:
    """Open policies, whole models or adapters; add what is wrong with any of them to `problems`."""
    opened: dict[str, Checkpoint | Adapter] = {}
    for name, reference in policies.items():
        try:
            folder, title = resolve_folder(reference), f"policy `{name}`"
            opened[name] = Adapter(folder, title) if is_adapter(folder) else Checkpoint(folder, title)
        except UserError as error:
            problems += error.problems
    return opened


def open_base(reference: str, weights: bool, problems: list[Problem]) -> Checkpoint | BareBase | None:
    """Open the base of adapters; add what is wrong with it to `problems`.

    Args:
        reference: folder or Hub id.
        weights: fetch its weights too, if it is a Hub id; a folder's are used where they are.
        problems: where faults go.
    """
    try:
        folder = resolve_folder(reference, weights)
        # Of a model on the Hub an index of shards may have come along, without the shards.
        fetched = weights or Path(reference).is_dir()
        return bare_base(folder, fetched) or Checkpoint(folder, "base")
    except UserError as error:
        problems += error.problems
        return None


def check_fit(base: Checkpoint, reference: str, policies: Mapping[str, Checkpoint | Adapter]) -> Fitting:
    """Refuse policies that cannot be merged into whole models; return the tensors that are merged.

    Args:
        base: the SFT model.
        reference: how the user named it.
        policies: by name.

    Raises:
        UserError: with every fault of the inputs.
    """
    whole = {name: policy for name, policy in policies.items() if isinstance(policy, Checkpoint)}
    adapters = {name: policy for name, policy in policies.items() if isinstance(policy, Adapter)}
    problems: list[Problem] = []
    try:
        fitting = check(base, whole)
    except UserError as error:
        problems += error.problems
    problems += check_adapters(base, reference, adapters, folded=True)
    if problems:
        raise UserError(problems)
    # A second copy of tied embeddings is not merged, so what an adapter adds to it would be lost.
    merged = set(fitting.names)
    for name, adapter in adapters.items():
        changed = [module.tensor for module in adapter.modules.values()] + list(adapter.saved)
        problems += [
            Problem(
                "the adapter changes a tensor that is not merged by itself",
                where=f"policy `{name}`: {tensor}",
                remedy="pass --as adapter, which keeps tied layers apart as PEFT does; or untie them in the base",
            )
            for tensor in changed
            if tensor in base.tensors and tensor not in merged
        ]
    if problems:
        raise UserError(problems)
    return Fitting(fitting.names, [*fitting.notes, *notes_on(base, adapters)])

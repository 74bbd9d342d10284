"""What a merge gives: a whole model, or an adapter, which adapters and the linear methods can stay."""

from __future__ import annotations

from collections.abc import Mapping

from rewarded_lines.checkpoints.adapters import names_adapter
from rewarded_lines.errors import fail
from rewarded_lines.planning.adapters import AdapterPlan, plan_adapters
from rewarded_lines.planning.plan import MergePlan, check_device, choose, plan_merge
from rewarded_lines.rules.methods import METHODS, soup

KINDS = ("auto", "full", "adapter")


def plan_as(
    kind: str,
    base: str,
    policies: Mapping[str, str],
    method: str,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    layers: str | None = None,
) -> MergePlan | AdapterPlan:
    """Return the plan of a merge into whole models, or into adapters.

    Args:
        kind: "full", "adapter", or "auto": an adapter if all policies are adapters, else a whole model.
        base: folder or Hub id of the SFT model.
        policies: folder or Hub id of each policy, by name, in the order of the weights.
        method: a key of `METHODS`.
        dtype: one of `DTYPES`.
        device: where the arithmetic of whole models runs.
        layers: the block list's pattern, for layouts that are not known.

    Raises:
        UserError: with every fault of the inputs, or because a method that is not linear cannot give an adapter.
    """
    choose("--as", kind, KINDS)
    if kind == "full" or (kind == "auto" and not all(map(names_adapter, policies.values()))):
        return plan_merge(base, policies, dtype=dtype, device=device, layers=layers)
    if METHODS[method].rule is not soup or METHODS[method].weigh:
        linear = [name for name, row in METHODS.items() if row.rule is soup and not row.weigh]
        raise fail(
            f"the method {method} gives no adapter: its residual is no sum of the policies'",
            where="--as",
            expected=f"with adapters as policies one of {', '.join(linear)}",
            remedy="pass --as full to fold the adapters into the base and merge whole models",
        )
    check_device(device)
    return plan_adapters(base, policies, dtype=dtype, layers=layers)


def kind_of(plan: MergePlan | AdapterPlan) -> str:
    """Return what a plan writes: "full" or "adapter"."""
    return "adapter" if isinstance(plan, AdapterPlan) else "full"

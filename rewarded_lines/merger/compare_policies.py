"""`inspect` of several policies: what training changed in each, how much of it they share, and of what rank it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rewarded_lines.checkpoints.headers import TensorInfo
from rewarded_lines.checkpoints.tensor_depth import SIDES, Side
from rewarded_lines.errors import fail
from rewarded_lines.kernels.blocks import Array, Workspace
from rewarded_lines.kernels.distances import Distance, distances, joined
from rewarded_lines.kernels.residual_matrices import cost, energies, whole_tensor
from rewarded_lines.merger.carried_settings import BASE
from rewarded_lines.merger.model_plan import ModelPlan
from rewarded_lines.merger.open_inputs import plan_merge
from rewarded_lines.merger.plan import choose
from rewarded_lines.progress import SILENT, Progress

RANKS = (1, 4, 16, 64)
SPECTRA = ("sample", "all", "none")
# Operations of the default's singular values, see `cost`: a few minutes on one core, less on several.
_BUDGET = 1e12
Level = tuple[str, int | None, Side]


@dataclass(frozen=True)
class Spectrum:
    """The singular values of the residuals' matrices of one kind, such as q_proj.

    Attributes:
        matrices: how many were measured.
        held: by policy the share of ‖τ‖² in the first k singular values, for each k of `RANKS`. A LoRA of rank k can
            hold so much of these matrices, and no more.
        stable_rank: by policy the median of ‖τ‖²/σ₁², σ₁ the largest singular value; None if all residuals are zero.
    """

    matrices: int
    held: Mapping[str, Sequence[float | None]]
    stable_rank: Mapping[str, float | None]


@dataclass(frozen=True)
class Comparison:
    """Several policies of one base.

    Attributes:
        base: the folder or Hub id.
        policies: likewise, by name.
        stacks: the lists of blocks with their lengths.
        levels: the distances at one depth: stack, block (None outside the blocks) and side, from first to last.
        tensors: the distances of every tensor.
        total: those of the whole model.
        spectra: by kind of matrix; "" has all kinds together. {} if none were measured.
        measured: the matrices in `spectra`.
        matrices: how many matrices the model has.
        notes: on the inputs and on what was left out.
    """

    base: str
    policies: Mapping[str, str]
    stacks: Mapping[str, int]
    levels: Mapping[Level, Distance]
    tensors: Mapping[str, Distance]
    total: Distance
    spectra: Mapping[str, Spectrum]
    measured: Sequence[str]
    matrices: int
    notes: Sequence[str]


def compare_policies(
    policies: Sequence[str | Path] | Mapping[str, str | Path],
    base: str | Path | None,
    *,
    layers: str | None = None,
    tower: str | None = None,
    spectra: str = "sample",
    progress: Progress = SILENT,
) -> Comparison:
    """Compare the residuals of several policies; see `inspect`, which calls this for more than one checkpoint."""
    choose("--spectra", spectra, SPECTRA)
    if base is None:
        what = "several policies are compared by what each adds to their base"
        raise fail(what, where="inspect", got="no --base", remedy="pass --base with the SFT model")
    named = _named(policies)
    progress.start("opening checkpoints")
    # Whose tokenizer a merge would take does not matter here.
    plan = plan_merge(str(base), named, layers=layers, tower=tower, tokenizer=BASE, config_from=BASE)
    infos = {name: plan.base.tensors[name] for name in plan.names}
    measured = distances(plan.base, plan.sources[1:], infos, progress)
    groups: dict[Level, list[Distance]] = {}
    for name, distance in measured.items():
        place = plan.depths.place[name]
        groups.setdefault((place.stack, place.block, place.side), []).append(distance)
    order = list(plan.depths.stacks)
    levels = sorted(groups, key=lambda one: (order.index(one[0]), SIDES.index(one[2]), one[1] or 0))
    matrices = [infos[name] for name in measured if len(infos[name].shape) == 2 and min(infos[name].shape) > 1]
    taken = _affordable(plan, matrices) if spectra == "sample" else matrices if spectra == "all" else []
    taken = [info for info in taken if not measured[info.name].nonfinite]
    return Comparison(
        str(base),
        named,
        plan.depths.stacks,
        {level: joined(groups[level]) for level in levels},
        measured,
        joined(measured.values()),
        _spectra(plan, taken, progress),
        [info.name for info in taken],
        len(matrices),
        [
            *plan.notes,
            *(f"not finite: {one.nonfinite} values of {name}" for name, one in measured.items() if one.nonfinite),
        ],
    )


def _named(policies: Sequence[str | Path] | Mapping[str, str | Path]) -> dict[str, str]:
    """Return the policies by name: the folder's, or all of the path where two folders have one name."""
    if isinstance(policies, Mapping):
        return {name: str(path) for name, path in policies.items()}
    ends = [Path(str(one)).name for one in policies]
    named = {str(one) if ends.count(end) > 1 else end: str(one) for one, end in zip(policies, ends, strict=True)}
    if len(named) < len(ends):
        raise fail("the same policy twice", where="inspect", got=", ".join(map(str, policies)))
    return named


def _affordable(plan: ModelPlan, matrices: Sequence[TensorInfo]) -> list[TensorInfo]:
    """Return the matrices of so many blocks, evenly spaced, as the budget allows, and of what lies outside them."""
    blocks: dict[tuple[str, int | None], list[TensorInfo]] = {}
    outside: list[list[TensorInfo]] = []
    for info in matrices:
        place = plan.depths.place[info.name]
        if place.block is None:
            outside.append([info])
        else:
            blocks.setdefault((place.stack, place.block), []).append(info)
    each = list(blocks.values())
    spent, taken = 0.0, list[TensorInfo]()
    for count in range(len(each), 0, -1):
        places = dict.fromkeys(np.linspace(0, len(each) - 1, count).round().astype(int).tolist())
        chosen = [info for place in places for info in each[place]]
        if _cost(plan, chosen) <= _BUDGET:
            spent, taken = _cost(plan, chosen), chosen
            break
    for group in outside:
        if spent + _cost(plan, group) <= _BUDGET:
            spent, taken = spent + _cost(plan, group), taken + group
    return taken


def _cost(plan: ModelPlan, matrices: Sequence[TensorInfo]) -> float:
    return sum(cost(info.shape) for info in matrices) * len(plan.policies)


def _spectra(plan: ModelPlan, matrices: Sequence[TensorInfo], progress: Progress) -> dict[str, Spectrum]:
    """Return the spectra by kind of matrix, those of all kinds first."""
    kinds: dict[str, list[list[Array]]] = {}
    for done, info in enumerate(matrices, start=1):
        progress.start(f"singular values, {done} of {len(matrices)} matrices")
        residuals = whole_tensor(plan.workspace, info, len(plan.policies), Workspace.residuals)
        found = [energies(residual) for residual in residuals]
        for kind in ("", info.name.removesuffix(".weight").rpartition(".")[2]):
            kinds.setdefault(kind, []).append(found)
    return {kind: _spectrum(list(plan.policies), found) for kind, found in kinds.items()}


def _spectrum(policies: Sequence[str], found: Sequence[Sequence[Array]]) -> Spectrum:
    held, stable = {}, {}
    for name, squares in zip(policies, zip(*found, strict=True), strict=True):
        total = sum(one.sum() for one in squares)
        firsts = (float(sum(one[:rank].sum() for one in squares)) for rank in RANKS)
        held[name] = [min(1.0, first / total) if total else None for first in firsts]
        ratios = [one.sum() / one[0] for one in squares if one[0] > 0]
        stable[name] = float(np.median(ratios)) if ratios else None
    return Spectrum(len(found), held, stable)

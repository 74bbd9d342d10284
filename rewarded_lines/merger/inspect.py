"""The verb `inspect`: the tensors of a checkpoint by depth, and their distance from its base."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from rewarded_lines.checkpoints.adapters import Adapter, is_adapter
from rewarded_lines.checkpoints.headers import TensorInfo
from rewarded_lines.checkpoints.reader import Checkpoint, open_checkpoint, resolve_folder, total_bytes
from rewarded_lines.checkpoints.tensor_depth import Depths, Side
from rewarded_lines.errors import Problem, UserError, fail, printable
from rewarded_lines.kernels.blocks import Source
from rewarded_lines.kernels.distances import Distance, distances
from rewarded_lines.merger.adapter_checks import check_adapters, notes_on
from rewarded_lines.merger.compare_policies import Comparison, compare_policies
from rewarded_lines.merger.input_names import depths_of, under_base_names
from rewarded_lines.merger.inspection import InspectedTensor, Inspection, Level, Residual, Sum
from rewarded_lines.merger.lines_schedule import Outside, Schedule
from rewarded_lines.merger.lora_folding import FoldedAdapter
from rewarded_lines.merger.model_checks import check
from rewarded_lines.merger.open_inputs import collected
from rewarded_lines.merger.plan import OUTSIDE, choose
from rewarded_lines.merger.record import read_origin
from rewarded_lines.merger.schedule_forms import Coefficients, Factors, Values, named_schedules
from rewarded_lines.merger.tied_layers import settle
from rewarded_lines.progress import SILENT, Progress

_SIDES: Sequence[Side] = ("before", "in", "after", "unknown", "flat", "base")
_SHOWN, _LONGEST = 3, 200
_ONE, _SEVERAL = "leave them out, or inspect one policy", "leave it out, or name several policies"
Policies = Sequence[str | Path] | Mapping[str, str | Path]


@overload
def inspect(checkpoint: str | Path, base: str | Path | None = None, **how: Any) -> Inspection: ...


@overload
def inspect(checkpoint: Policies, base: str | Path | None = None, **how: Any) -> Comparison: ...


def inspect(  # type: ignore[misc]  # the overloads leave the options open
    checkpoint: str | Path | Policies,
    base: str | Path | None = None,
    *,
    alpha: Values = None,
    beta: Values = None,
    schedule: Coefficients = None,
    modules: Factors = None,
    outside: Outside = "alpha",
    layers: str | None = None,
    tower: str | None = None,
    spectra: str = "sample",
    progress: Progress = SILENT,
) -> Inspection | Comparison:
    """Return depth and scale of every tensor and, against a base, the norms of the residual τ = θ − θ_base.

    Several policies are compared with one another: which values each changed, signs, cosines and ranks of residuals.
    Without a base only headers are read. With a base both checkpoints pass in blocks. Sums of blocks are added
    exactly, so the numbers are the same for any number of threads and any sharding.

    Args:
        checkpoint: folder or Hub id of a model, or of a LoRA adapter of the base; or several policies.
        base: folder or Hub id of its SFT model.
        alpha: α, the scale of the first block; None is 1, as for `beta`.
        beta: β, added by the last block.
        schedule: a coefficient for each block, in place of α and β; see `read_schedule`.
        modules: factors by kind of module.
        outside: the scale of embeddings, final norm and head: "alpha", or "depth" for that of the nearest block.
        layers: the pattern of the block list, for unknown layouts.
        tower: what becomes of other lists, e.g. `vision=flat`; see `find_depths`.
        spectra: of several policies, whose singular values are measured: "sample" takes evenly spaced blocks as far
            as a fixed number of operations allows, "all" takes all matrices.
        progress: receives the bytes read.

    Raises:
        UserError: a checkpoint is incomplete, its layout is unknown, or it was trained from another base.
    """
    given = (alpha, beta, schedule, modules)
    if not isinstance(checkpoint, str | Path):
        if outside != "alpha" or any(one is not None for one in given):
            where = "--alpha, --beta, --schedule, --modules, --outside"
            raise fail("scales are shown for a single checkpoint", where=where, remedy=_ONE)
        return compare_policies(checkpoint, base, layers=layers, tower=tower, spectra=spectra, progress=progress)
    if spectra != "sample":
        raise fail("singular values are measured for several policies", where=f"--spectra {spectra}", remedy=_SEVERAL)
    return _inspect_one(str(checkpoint), None if base is None else str(base), given, outside, layers, tower, progress)


def _inspect_one(
    checkpoint: str,
    base: str | None,
    given: Sequence[Any],
    outside: Outside,
    layers: str | None,
    tower: str | None,
    progress: Progress,
) -> Inspection:
    scales, schedules = named_schedules(Path(checkpoint).name, given, outside)
    choose("--outside", outside, OUTSIDE)
    progress.start("opening checkpoints")
    subject = _open(checkpoint, base)
    infos = subject.tensors
    depths = depths_of(infos, subject.config, layers, tower)
    Schedule((*scales.lines, *(one.lines[0] for one in schedules.values())), scales.modules).check(depths)
    measured = distances(subject.base, [subject.source], infos, progress) if subject.base else {}
    tensors = [_tensor(info, depths, scales, measured.get(info.name)) for info in infos.values()]
    stacks = list(depths.stacks)
    tensors.sort(key=lambda one: (stacks.index(one.stack), _SIDES.index(one.side), one.block or 0))
    return Inspection(
        checkpoint,
        base,
        scales,
        schedules,
        depths.stacks,
        _levels(tensors, infos),
        _sum(tensors, infos),
        tensors,
        read_origin(subject.folder),
        [*subject.notes, *_nonfinite(tensors)],
    )


@dataclass(frozen=True)
class _Subject:
    """A complete checkpoint that fits its base; `tensors` are those that a merge would take."""

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    source: Source
    base: Checkpoint | None
    notes: list[str]


def _open(checkpoint: str, base: str | None) -> _Subject:
    """Open a model or an adapter and, if given, its base; refuse a pair that cannot be merged."""
    opened: Checkpoint | Adapter | None = None
    origin: Checkpoint | None = None
    problems: list[Problem] = []
    with collected(problems):
        folder = resolve_folder(checkpoint)
        opened = Adapter(folder, checkpoint) if is_adapter(folder) else Checkpoint(folder, checkpoint)
    with collected(problems):
        origin = None if base is None else open_checkpoint(base)
    if opened is None or problems:
        raise UserError(problems)
    if isinstance(opened, Adapter):
        return _adapted(opened, origin, base)
    renamed = under_base_names(origin, {opened.folder.name: opened}) if origin else []
    names, notes = check(origin, {opened.folder.name: opened}) if origin else check(opened, {})
    tensors = {name: opened.tensors[name] for name in names}
    config = origin.config if origin else opened.config
    return _Subject(opened.folder, config, tensors, opened, origin, renamed + notes)


def _adapted(adapter: Adapter, base: Checkpoint | None, reference: str | None) -> _Subject:
    if base is None or reference is None:
        named = adapter.config.base[:_LONGEST]
        named = printable(shlex.quote(named)) if named else "with the model it was trained from"
        what, remedy = "an adapter needs its base to be inspected", f"pass --base {named}"
        raise fail(what, where=adapter.name, got="no --base", remedy=remedy)
    adapters = {adapter.folder.name: adapter}
    renamed = under_base_names(base, adapters) + settle(base, adapters)
    if problems := check_adapters(base, reference, adapters, folded=True):
        raise UserError(problems)
    names, left_out = check(base, {})
    tensors = {name: base.tensors[name] for name in names}
    count = f"{len(adapter.modules)} matrices of low rank, {len(adapter.saved)} tensors whole"
    notes = [f"an adapter: {count}; the rest is the base's", *renamed, *left_out, *notes_on(base, reference, adapters)]
    return _Subject(adapter.folder, base.config, tensors, FoldedAdapter(adapter, base), base, notes)


def _tensor(info: TensorInfo, depths: Depths, schedule: Schedule, measured: Distance | None) -> InspectedTensor:
    place = depths.place[info.name]
    scale = schedule.scale(place, info.name)
    residual = None
    if measured:
        norm, base_norm = measured.norm(0), math.sqrt(measured.base)
        residual = Residual(norm, base_norm, abs(scale) * norm, info.elements, measured.changed, measured.nonfinite)
    return InspectedTensor(
        info.name, place.stack, place.block, place.side, info.shape, info.dtype.torch, info.elements, scale, residual
    )


def _levels(tensors: Sequence[InspectedTensor], infos: Mapping[str, TensorInfo]) -> list[Level]:
    groups: dict[tuple[str, int | None, Side], list[InspectedTensor]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.stack, tensor.block, tensor.side), []).append(tensor)
    levels = []
    for (stack, block, side), group in groups.items():
        modules = dict.fromkeys(one.name.rpartition(".")[0] or one.name for one in group) if block is None else ()
        scales = tuple(sorted({one.scale for one in group}))
        place: list[Any] = [stack, block, side, group[0].scale, tuple(modules), scales]
        levels.append(Level(*[*vars(_sum(group, infos)).values(), *place]))
    return levels


def _sum(tensors: Sequence[InspectedTensor], infos: Mapping[str, TensorInfo]) -> Sum:
    residuals = [tensor.residual for tensor in tensors if tensor.residual]
    return Sum(
        len(tensors),
        sum(tensor.parameters for tensor in tensors),
        total_bytes(infos[tensor.name] for tensor in tensors),
        tuple(sorted({tensor.dtype for tensor in tensors})),
        _joined(residuals) if residuals else None,
    )


def _joined(residuals: Sequence[Residual]) -> Residual:
    return Residual(
        math.hypot(*(one.norm for one in residuals)),
        math.hypot(*(one.base_norm for one in residuals)),
        math.hypot(*(one.scaled_norm for one in residuals)),
        sum(one.values for one in residuals),
        sum(one.changed for one in residuals),
        sum(one.nonfinite for one in residuals),
    )


def _nonfinite(tensors: Iterable[InspectedTensor]) -> list[str]:
    found = [(one.name, one.residual.nonfinite) for one in tensors if one.residual and one.residual.nonfinite]
    notes = [f"not finite: {count} values of {name}, here or in the base" for name, count in found[:_SHOWN]]
    rest = len(found) - _SHOWN
    return notes + ([f"not finite: values of {rest} more tensors"] if rest > 0 else [])

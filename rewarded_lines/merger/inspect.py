"""The verb `inspect`: the tensors of a checkpoint by depth, and their distance from its base."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from rewarded_lines.checkpoints.adapter_config import read_adapter_config
from rewarded_lines.checkpoints.adapters import is_adapter
from rewarded_lines.checkpoints.headers import TensorInfo
from rewarded_lines.checkpoints.reader import Checkpoint, resolve_folder, total_bytes
from rewarded_lines.checkpoints.tensor_depth import SIDES, Depths, Side
from rewarded_lines.errors import Problem, UserError, fail, printable
from rewarded_lines.kernels.blocks import Source
from rewarded_lines.kernels.distances import Distance, distances
from rewarded_lines.merger.compare_policies import Comparison, compare_policies
from rewarded_lines.merger.input_names import depths_of
from rewarded_lines.merger.lines_schedule import Outside, Schedule
from rewarded_lines.merger.lora_folding import FoldedAdapter
from rewarded_lines.merger.model_checks import check
from rewarded_lines.merger.open_inputs import open_whole
from rewarded_lines.merger.plan import OUTSIDE, choose
from rewarded_lines.merger.record import Record, read_origin
from rewarded_lines.merger.schedule_forms import Coefficients, Factors, Values, named_schedules
from rewarded_lines.progress import SILENT, Progress

_SHOWN, _LONGEST = 3, 200
_ONE, _SEVERAL = "leave them out, or inspect one policy", "leave it out, or name several policies"
Policies = Sequence[str | Path] | Mapping[str, str | Path]


@dataclass(frozen=True)
class Residual:
    """The residual of one or more tensors; norms are L2, in float64.

    Attributes:
        norm: ‖τ‖ with τ = θ − θ_base.
        base_norm: ‖θ_base‖ of the same values.
        scaled_norm: ‖s·τ‖, s each tensor's LiNeS scale.
        values: the number of values.
        changed: the number that differ from the base's.
        nonfinite: the number that are NaN or infinite, in the base or in the checkpoint.
    """

    norm: float
    base_norm: float
    scaled_norm: float
    values: int
    changed: int
    nonfinite: int = 0

    @property
    def relative(self) -> float:
        """Return ‖τ‖/‖θ_base‖; infinite if only the base is zero."""
        if self.base_norm == 0:
            return math.inf if self.norm else 0.0
        return self.norm / self.base_norm

    @property
    def share_changed(self) -> float:
        """Return the share of the values that differ from the base's."""
        return self.changed / self.values if self.values else 0.0


@dataclass(frozen=True)
class InspectedTensor:
    """One tensor: its place in the model (see `Place`), its LiNeS scale and, against a base, its residual."""

    name: str
    stack: str
    block: int | None
    side: Side
    shape: tuple[int, ...]
    dtype: str
    parameters: int
    scale: float
    residual: Residual | None


@dataclass(frozen=True)
class Sum:
    """Totals over several tensors; integers and booleans count, but have no residual."""

    tensors: int
    parameters: int
    bytes: int
    dtypes: tuple[str, ...]
    residual: Residual | None


@dataclass(frozen=True)
class Level(Sum):
    """The tensors at one depth: in a block, before the blocks of a list or after them; `scales` are theirs."""

    stack: str
    block: int | None
    side: Side
    scale: float
    modules: tuple[str, ...]
    scales: tuple[float, ...] = ()


@dataclass(frozen=True)
class Inspection:
    """A checkpoint by depth: lists of blocks with their lengths, levels, tensors; schedules of named policies."""

    checkpoint: str
    base: str | None
    schedule: Schedule
    schedules: Mapping[str, Schedule]
    stacks: Mapping[str, int]
    levels: Sequence[Level]
    total: Sum
    tensors: Sequence[InspectedTensor]
    origin: Record | None
    notes: Sequence[str]


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
    folder, source, origin, infos, notes = _open(checkpoint, base)
    depths = depths_of(infos, origin.config, layers, tower)
    Schedule((*scales.lines, *(one.lines[0] for one in schedules.values())), scales.modules).check(depths)
    measured = {} if base is None else distances(origin, [source], infos, progress)
    tensors = [_tensor(info, depths, scales, measured.get(info.name)) for info in infos.values()]
    stacks = list(depths.stacks)
    tensors.sort(key=lambda one: (stacks.index(one.stack), SIDES.index(one.side), one.block or 0))
    return Inspection(
        checkpoint,
        base,
        scales,
        schedules,
        depths.stacks,
        _levels(tensors, infos),
        _sum(tensors, infos),
        tensors,
        read_origin(folder),
        [*notes, *_nonfinite(tensors)],
    )


def _open(checkpoint: str, base: str | None) -> tuple[Path, Source, Checkpoint, dict[str, TensorInfo], list[str]]:
    """Return folder and values of a model or adapter, its base, the tensors that a merge would take, and notes.

    Without a base the model stands for it. A pair that cannot be merged is refused.
    """
    if base is None:
        alone = _model(checkpoint)
        names, notes = check(alone, {})
        return alone.folder, alone, alone, {name: alone.tensors[name] for name in names}, notes
    problems: list[Problem] = []
    origin, opened, names, notes = open_whole(base, {Path(checkpoint).name: checkpoint}, problems)
    if problems:
        raise UserError(problems)
    (subject,) = opened.values()
    if isinstance(subject, Checkpoint):
        return subject.folder, subject, origin, {name: subject.tensors[name] for name in names}, notes
    count = f"{len(subject.modules)} matrices of low rank, {len(subject.saved)} tensors whole"
    notes = [f"an adapter: {count}; the rest is the base's", *notes]
    return subject.folder, FoldedAdapter(subject, origin), origin, {name: origin.tensors[name] for name in names}, notes


def _model(checkpoint: str) -> Checkpoint:
    """Open a model without its base; an adapter has no meaning without one."""
    folder = resolve_folder(checkpoint)
    if not is_adapter(folder):
        return Checkpoint(folder, checkpoint)
    named = read_adapter_config(folder).base[:_LONGEST]
    named = printable(shlex.quote(named)) if named else "with the model it was trained from"
    what, remedy = "an adapter needs its base to be inspected", f"pass --base {named}"
    raise fail(what, where=checkpoint, got="no --base", remedy=remedy)


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

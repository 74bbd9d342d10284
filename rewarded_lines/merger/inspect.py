"""The verb `inspect`: the tensors of a checkpoint by depth, and their distance from its base."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rewarded_lines.checkpoints.adapters import Adapter, is_adapter
from rewarded_lines.checkpoints.headers import TensorInfo
from rewarded_lines.checkpoints.reader import Checkpoint, open_checkpoint, read_json_object, resolve_folder, total_bytes
from rewarded_lines.checkpoints.tensor_depth import Depths, Side
from rewarded_lines.errors import Problem, UserError, fail, printable
from rewarded_lines.kernels.blocks import Source
from rewarded_lines.kernels.norms import Distance, distances
from rewarded_lines.merger.adapter_checks import check_adapters, notes_on
from rewarded_lines.merger.input_names import depths_of, under_base_names
from rewarded_lines.merger.lines_schedule import Outside, Schedule
from rewarded_lines.merger.lora_folding import FoldedAdapter
from rewarded_lines.merger.model_checks import check
from rewarded_lines.merger.open_inputs import collected
from rewarded_lines.merger.plan import OUTSIDE, choose
from rewarded_lines.merger.record import RECORD_FILE
from rewarded_lines.merger.schedule_forms import Coefficients, Factors, Values, named_schedules
from rewarded_lines.merger.spec import MergeSpec
from rewarded_lines.merger.tied_layers import settle
from rewarded_lines.progress import SILENT, Progress

_SIDES: Sequence[Side] = ("before", "in", "after", "unknown", "flat", "base")
_SHOWN, _LONGEST = 3, 200


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
class Origin:
    """The merge in the checkpoint's merge.json."""

    policies: tuple[str, ...]
    merge: MergeSpec


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
    origin: Origin | None
    notes: Sequence[str]


def inspect(
    checkpoint: str | Path,
    base: str | Path | None = None,
    *,
    alpha: Values = None,
    beta: Values = None,
    schedule: Coefficients = None,
    modules: Factors = None,
    outside: Outside = "alpha",
    layers: str | None = None,
    tower: str | None = None,
    progress: Progress = SILENT,
) -> Inspection:
    """Return depth and scale of every tensor and, against a base, the norms of the residual τ = θ − θ_base.

    Without a base only headers are read. With a base both checkpoints pass in blocks. Sums of blocks are added
    exactly, so the numbers are the same for any number of threads and any sharding.

    Args:
        checkpoint: folder or Hub id of a model, or of a LoRA adapter of the base.
        base: folder or Hub id of its SFT model.
        alpha: α, the scale of the first block; None is 1, as for `beta`.
        beta: β, added by the last block.
        schedule: a coefficient for each block, in place of α and β; see `read_schedule`.
        modules: factors by kind of module.
        outside: the scale of embeddings, final norm and head: "alpha", or "depth" for that of the nearest block.
        layers: the pattern of the block list, for unknown layouts.
        tower: what becomes of other lists, e.g. `vision=flat`; see `find_depths`.
        progress: receives the bytes read.

    Raises:
        UserError: a checkpoint is incomplete, its layout is unknown, or it was trained from another base.
    """
    scales, schedules = named_schedules(Path(checkpoint).name, (alpha, beta, schedule, modules), outside)
    choose("--outside", outside, OUTSIDE)
    progress.start("opening checkpoints")
    subject = _open(str(checkpoint), None if base is None else str(base))
    infos = subject.tensors
    depths = depths_of(infos, subject.config, layers, tower)
    Schedule((*scales.lines, *(one.lines[0] for one in schedules.values())), scales.modules).check(depths)
    measured = distances(subject.base, subject.source, infos, progress) if subject.base else {}
    tensors = [_tensor(info, depths, scales, measured.get(info.name)) for info in infos.values()]
    stacks = list(depths.stacks)
    tensors.sort(key=lambda one: (stacks.index(one.stack), _SIDES.index(one.side), one.block or 0))
    return Inspection(
        str(checkpoint),
        None if base is None else str(base),
        *(scales, schedules, depths.stacks),
        _levels(tensors, infos),
        _sum(tensors, infos),
        tensors,
        _origin(subject.folder),
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
        named = printable(adapter.config.base[:_LONGEST]) or "with the model it was trained from"
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
        norm = math.sqrt(measured.residual)
        base_norm = math.sqrt(measured.base)
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


def _origin(folder: Path) -> Origin | None:
    """Return the merge in merge.json, or None without a readable merge.json."""
    path = folder / RECORD_FILE
    if not path.is_file():
        return None
    try:
        record = read_json_object(path)
        options = {name: str(value) for name, value in record.get("options", {}).items()}
        return Origin(tuple(record["weights"]), MergeSpec.from_dict({**record, "options": options}))
    except (UserError, LookupError, TypeError, ValueError, AttributeError):
        return None


def _nonfinite(tensors: Iterable[InspectedTensor]) -> list[str]:
    found = [(one.name, one.residual.nonfinite) for one in tensors if one.residual and one.residual.nonfinite]
    notes = [f"not finite: {count} values of {name}, here or in the base" for name, count in found[:_SHOWN]]
    rest = len(found) - _SHOWN
    return notes + ([f"not finite: values of {rest} more tensors"] if rest > 0 else [])

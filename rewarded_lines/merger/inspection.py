"""What `inspect` finds in one checkpoint: its tensors, its levels by depth, their residuals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rewarded_lines.checkpoints.tensor_depth import Side
from rewarded_lines.merger.lines_schedule import Schedule
from rewarded_lines.merger.record import Origin


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
    origin: Origin | None
    notes: Sequence[str]

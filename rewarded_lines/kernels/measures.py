"""Passes over tensors that count and add: machine code reads the files; what is left goes by blocks in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from rewarded_lines.checkpoints.reader import TensorFiles
from rewarded_lines.kernels import kernels
from rewarded_lines.kernels.blocks import BLOCK, Array, Source, Workspace, blocks_of
from rewarded_lines.kernels.file_tensors import Call, FileTensor, file_tensor
from rewarded_lines.kernels.rule_programs import Notes
from rewarded_lines.kernels.thread_pool import share_out

# Values that machine code takes at a time.
RUN = 8 * BLOCK
# So many values more than are collected may be written.
SPARE = 8
# How many values are summed apart from others: those of the innermost loop of numpy's sums.
SUMMED = 128
Note = Callable[[Notes, Sequence[Any]], None]
"""Notes a program that counts or adds, by the policies' residuals as symbols."""


class Counter(Protocol):
    """What one thread finds."""

    @property
    def targets(self) -> Sequence[Array]:
        """Return what machine code adds to."""

    def take(self, count: int) -> None:
        """Take from the targets what machine code added for so many values."""

    def clear(self) -> None:
        """Set the targets back to 0."""

    def look(self, workspace: Workspace) -> None:
        """Take what the block in a workspace adds, by numpy."""


class Measure(NamedTuple):
    """A program that counts or adds over the residuals of one tensor.

    Attributes:
        loop: see `machine_code.Loop`.
        parameters: its constants and factors.
        tensor: None if not all of it is in files.
    """

    loop: Any
    parameters: Array
    tensor: FileTensor | None

    def files(self, values: range, targets: Sequence[Array]) -> bool:
        """Add to the targets what some values give, a multiple of `LANES`; return False as `FileTensor.read`."""
        if self.tensor is None:
            return False
        # A sum begins and ends in one piece.
        piece = max(SUMMED, kernels.compiled_files().PIECE // SUMMED * SUMMED)
        buffers = self.tensor.buffers(min(len(values), piece))
        return self.tensor.read(values, [Call(self.loop, self.parameters, targets)], buffers)

    def block(self, workspace: Workspace, targets: Sequence[Array]) -> bool:
        """Add what the block in a workspace gives, likewise."""
        inputs = workspace.inputs()
        done: bool = self.loop.measure(inputs, self.parameters, targets, inputs[0].size)
        return done


def _measure(sources: Sequence[Source], name: str, note: Note, factors: Sequence[float]) -> Measure | None:
    """Return what measures a tensor; None if that needs more than machine code, or work is too short for it."""
    if not kernels.is_long():
        return None
    code, notes = kernels.machine_code(), Notes()
    stored = [source.tensors[name].dtype.storage if name in source.tensors else None for source in sources]
    kinds = [kind or np.dtype(np.float64) for kind in stored]
    if not code.supports(*kinds):
        return None
    rows = [notes.residual(row, 0) if stored[row] else notes.symbol("source", row) for row in range(1, len(stored))]
    try:
        note(notes, rows)
    except (TypeError, ValueError, AttributeError):
        return None
    loop = code.translated(tuple(notes.places), tuple(kind.name for kind in kinds), "float64")
    parameters = np.array([*(float(text) for text in notes.constants), *factors])
    return Measure(loop, parameters, file_tensor(sources, name))


def measure(
    base: TensorFiles,
    policies: Sequence[Source],
    names: Sequence[str],
    threads: int,
    begin: Callable[[], Counter],
    note: Note,
    factors: Sequence[float],
    unit: int = 8,
) -> None:
    """Pass all values of some tensors through counters, one for each thread.

    Args:
        base: the SFT model.
        policies: the inputs.
        names: the tensors.
        threads: 0 for all cores.
        begin: called once in each thread.
        note: see `Note`.
        factors: the program's numbers.
        unit: so many values are taken together by machine code, counted from a tensor's start.
    """
    measures = {name: _measure([base, *policies], name, note, factors) for name in names}
    elements = [(name, base.tensors[name].elements) for name in names]
    runs = [(name, start, min(RUN, count - start)) for name, count in elements for start in range(0, count, RUN)]
    share_out(runs, lambda: _Thread(Workspace(base, policies), begin(), measures, unit).run, threads)


class _Thread:
    """Passes runs of values through one counter."""

    def __init__(
        self, workspace: Workspace, counter: Counter, measures: Mapping[str, Measure | None], unit: int
    ) -> None:
        self._workspace, self._counter, self._measures, self._unit = workspace, counter, measures, unit

    def run(self, part: tuple[str, int, int]) -> None:
        """Take some values of a tensor: by name, start and number."""
        name, start, count = part
        measure, whole = self._measures[name], count // self._unit * self._unit
        values = range(start, start + whole)
        if not (measure and whole and self._taken(measure.files(values, self._counter.targets), whole)):
            whole = 0
        for first, size in blocks_of(count - whole):
            self._block(name, start + whole + first, size, measure)

    def _block(self, name: str, start: int, count: int, measure: Measure | None) -> None:
        whole = count // self._unit * self._unit if measure else 0
        for first, size in ((start, whole), (start + whole, count - whole)):
            if size:
                self._workspace.load(name, first, size)
                done = measure and first == start and whole and measure.block(self._workspace, self._counter.targets)
                if not self._taken(bool(done), size):
                    self._counter.look(self._workspace)

    def _taken(self, done: bool, count: int) -> bool:
        """Let the counter take so many values if machine code is done with them; return whether it is."""
        if done:
            self._counter.take(count)
        self._counter.clear()
        return done


def note_between(notes: Notes, values: Sequence[Any], bounds: int, ends: bool = True, zeros: bool = True) -> None:
    """Note what `numpy_kernels.count_between` counts.

    The targets are, for each of the bounds: how many sizes are between, below the upper, above it, and equal to the
    lower; then the sizes between, of each of the bounds; and how many of the first values are 0. Without `ends` and
    `zeros` the last two of each, and the last of all, are not counted: that takes half the comparisons.
    """
    sizes = [abs(value) for value in values]
    for row in range(bounds):
        size, (low, high, other) = sizes[row % len(sizes)], (notes.symbol("factor", 3 * row + k) for k in range(3))
        below = size < high
        inside = (size > low) & below
        for place, each in enumerate((below, *((size > high, size == other) if ends else ())), start=1):
            notes.symbol("count", 4 * row + place, each.place)
        notes.symbol("collect", 4 * row, 4 * bounds + row, inside.place, size.place)
    if zeros:
        notes.symbol("count", 5 * bounds, (sizes[0] == 0.0).place)


def factors_between(bounds: Sequence[tuple[float, float]]) -> list[float]:
    """Return the factors of `note_between`."""
    # The lower bound again, if it is another: nothing equals NaN.
    return [each for low, high in bounds for each in (low, high, low if low < high else math.nan)]


def note_overlaps(notes: Notes, values: Sequence[Any]) -> None:
    """Note how many sizes above a factor several of the values have, and then how many each has."""
    sizes = [abs(value) for value in values]
    masks = [size > notes.symbol("factor", 0) for size in sizes]
    # Nothing is below itself.
    some, several = masks[0], masks[0] < masks[0]
    for mask in masks[1:]:
        some, several = some | mask, several | (some & mask)
    for row, mask in enumerate(masks):
        notes.symbol("count", row, (mask & several).place)
        notes.symbol("count", len(masks) + row, mask.place)


def note_squares(notes: Notes, values: Sequence[Any], measured: Callable[[Sequence[Any]], Any]) -> None:
    """Note the sums of the squares of each of the values where what is measured of all is at least a factor."""
    measure = measured(values)
    notes.symbol("finite", measure.place)
    selected = measure >= notes.symbol("factor", 0)
    for row, value in enumerate(values):
        chosen = value * selected
        notes.symbol("sum", row, (chosen * chosen).place)

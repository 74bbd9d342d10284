"""Passes over tensors that count and add: machine code reads the files; what is left goes by blocks in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
Note = Callable[[Notes, Sequence[Any]], None]
"""Notes a program that counts or adds, by the policies' residuals as symbols."""


class Counter(Protocol):
    """What one thread finds.

    Attributes:
        targets: what machine code adds to.
    """

    targets: Sequence[Array]

    def take(self, name: str, start: int, count: int) -> None:
        """Take from the targets what a run of machine code added."""

    def clear(self) -> None:
        """Set what machine code adds to back to 0."""

    def look(self, workspace: Workspace) -> None:
        """Take what the block in a workspace adds."""


class FileMeasure(NamedTuple):
    """A program that counts or adds over the residuals of one tensor of files.

    Attributes:
        tensor: where it is.
        loop: see `machine_code.Loop`.
        parameters: its constants and factors.
    """

    tensor: FileTensor
    loop: Any
    parameters: Array

    def run(self, values: range, targets: Sequence[Array]) -> bool:
        """Add to the targets what some values give, a multiple of `LANES`; return False as `FileTensor.read`."""
        buffers = self.tensor.buffers(min(len(values), kernels.compiled_files().PIECE))
        return self.tensor.read(values, [Call(self.loop, self.parameters, targets)], buffers)


def file_measure(
    sources: Sequence[Source], name: str, note: Note, factors: Sequence[float], plain: bool
) -> FileMeasure | None:
    """Return what measures a tensor in one pass over files; None if that needs more than machine code.

    Args:
        sources: the base and the policies.
        name: the tensor.
        note: see `Note`.
        factors: the program's numbers.
        plain: whether the program only compares residuals. What others make of float64 may not be finite.
    """
    tensor, notes = file_tensor(sources, name), Notes()
    if tensor is None or not (plain or all(kind != np.float64 for kind in tensor.kinds)):
        return None
    try:
        note(notes, [notes.residual(row, 0) for row in range(1, len(sources))])
    except (TypeError, ValueError, AttributeError):
        return None
    loop = kernels.machine_code().translated(tuple(notes.places), tuple(kind.name for kind in tensor.kinds), "float64")
    constants = [float(text) for text in notes.constants]
    return FileMeasure(tensor, loop, np.array([*constants, *factors]))


def measure(
    base: TensorFiles,
    policies: Sequence[Source],
    names: Sequence[str],
    threads: int,
    begin: Callable[[], Counter],
    note: Note,
    factors: Sequence[float] = (),
    plain: bool = True,
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
        factors: see `file_measure`.
        plain: likewise.
        unit: so many values are taken together by machine code, counted from a tensor's start.
    """
    sources = [base, *policies]
    measures = {name: file_measure(sources, name, note, factors, plain) for name in names}
    runs = [
        (name, start, min(RUN, base.tensors[name].elements - start))
        for name in names
        for start in range(0, base.tensors[name].elements, RUN)
    ]

    def worker() -> Callable[[tuple[str, int, int]], None]:
        workspace, counter = Workspace(base, policies), begin()

        def work(run: tuple[str, int, int]) -> None:
            (name, start, count), measure = run, measures[run[0]]
            whole = count // unit * unit if measure else 0
            if measure and whole:
                if measure.run(range(start, start + whole), counter.targets):
                    counter.take(name, start, whole)
                else:
                    whole = 0
                counter.clear()
            for first, size in blocks_of(count - whole):
                workspace.load(name, start + whole + first, size)
                counter.look(workspace)

        return work

    share_out(runs, worker, threads)

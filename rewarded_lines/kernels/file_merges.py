"""Merges of tensors in files: read, merged and rounded into the outputs' memory by one call of machine code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rewarded_lines.checkpoints.reader import TensorFiles
from rewarded_lines.kernels import kernels
from rewarded_lines.kernels.blocks import Array, Source
from rewarded_lines.kernels.rule_programs import Program, programs
from rewarded_lines.kernels.tensor_merge import TensorMerge

# Longer rows are ranked a block of them at a time, with the whole row in memory.
LONGEST = 1 << 18


@dataclass(frozen=True)
class FileMerge:
    """How one tensor of all outputs is made of files.

    Attributes:
        name: of the tensor.
        sources: the base and the policies.
        files: a descriptor of each one's file.
        places: where the tensor begins in each.
        programs: see `Program`.
        unit: so many values are merged together, counted from the tensor's start: those of an operation, or a row.
    """

    name: str
    sources: Sequence[TensorFiles]
    files: Array
    places: Array
    programs: Sequence[Program]
    unit: int

    def run(self, start: int, outputs: Sequence[Array]) -> bool:
        """Fill an array for each output from the tensor's `start`-th value on.

        Return False if a value may not be finite, or a file gave fewer bytes: then the arrays mean nothing.
        """
        unit, last = self.unit, start + outputs[0].size
        inner = range(-(-start // unit) * unit, last // unit * unit)
        if inner and not self._read(inner, [out[inner.start - start :] for out in outputs]):
            return False
        units = {place // unit * unit for place in (start, last - 1) if place not in inner}
        return all(self._one(first, start, outputs) for first in sorted(units))

    def _read(self, inner: range, outputs: Sequence[Array]) -> bool:
        """Fill the outputs with whole units, in pieces that stay in cache."""
        code, files = kernels.machine_code(), kernels.compiled_files()
        piece = min(len(inner), max(1, files.PIECE // self.unit) * self.unit)
        buffers = [np.empty(piece, source.tensors[self.name].dtype.storage) for source in self.sources]
        sizes = np.array([buffer.itemsize for buffer in buffers], np.int64)
        loops = self._ranks(buffers)
        loops += [
            (each.loop, each.parameters, [outputs[index] for index in each.outputs], len(each.outputs))
            for each in self.programs
        ]
        given = [self.files, self.places + inner.start * sizes, sizes, code.addresses(buffers)]
        targets = [code.addresses(rows) for _, _, rows, _ in loops]
        called = [
            np.array([loop.address for loop, *_ in loops], np.int64),
            code.addresses(parameters for _, parameters, *_ in loops),
            code.addresses(targets),
            np.array([count for *_, count in loops], np.int64),
        ]
        files_at, called_at = ([array.ctypes.data for array in arrays] for arrays in (given, called))
        read = files.reader(piece)
        return not read(len(self.sources), *files_at, len(loops), *called_at, len(inner), inner.start)

    def _ranks(self, buffers: list[Array]) -> list[tuple[Any, Array, list[Array], int]]:
        """Return what ranks the values in the first buffers; add buffers for the ranks."""
        found, kinds, size = [], [buffer.dtype.name for buffer in buffers], buffers[0].size
        for mask in self.programs[0].ranked:
            row, width = mask.ranked
            ranks = kernels.row_ranks()
            buffers.append(np.empty(size, np.uint32))
            loop, parameters = ranks.ranker((kinds[0], kinds[row + 1])), np.array([0, row + 1, width])
            found.append((loop, parameters, [buffers[-1], *ranks.scratch(width)], 1))
        return found

    def _one(self, first: int, start: int, outputs: Sequence[Array]) -> bool:
        """Fill the outputs where they have a part of a unit of values."""
        info = self.sources[0].tensors[self.name]
        count = min(self.unit, info.elements - first)
        values = [source.read(self.name, first, count) for source in self.sources]
        for loop, parameters, targets, _ in self._ranks(values):
            loop.measure(values, parameters, targets, count)
        made = [np.empty(count, out.dtype) for out in outputs]
        for program in self.programs:
            if not program.loop.run(values, program.parameters, [made[index] for index in program.outputs], first):
                return False
        for out, row in zip(outputs, made, strict=True):
            here = slice(max(start, first), min(start + out.size, first + count))
            out[here.start - start : here.stop - start] = row[here.start - first : here.stop - first]
        return True


def file_merge(sources: Sequence[Source], name: str, steps: Sequence[TensorMerge]) -> FileMerge | None:
    """Return how a tensor of all outputs is made of files in one pass; None if that needs more than machine code."""
    if not kernels.is_long():
        return None
    files = [source for source in sources if isinstance(source, TensorFiles)]
    runs = [source.run(name) for source in files]
    if len(files) < len(sources) or None in runs:
        return None
    made = programs(steps, [source.tensors[name].dtype.storage for source in files])
    if made is None:
        return None
    lanes = kernels.machine_code().LANES
    (unit,) = {mask.ranked[1] for mask in made[0].ranked} or {lanes}
    if unit % lanes or unit > LONGEST:
        return None
    descriptors, places = np.array(runs, np.int64).T.copy()
    return FileMerge(name, files, descriptors, places, made, unit)

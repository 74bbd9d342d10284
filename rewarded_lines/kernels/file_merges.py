"""Merges of tensors in files: read, merged and rounded into the outputs' memory by one call of machine code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rewarded_lines.kernels import kernels
from rewarded_lines.kernels.blocks import Array, Source
from rewarded_lines.kernels.file_tensors import Call, FileTensor, file_tensor
from rewarded_lines.kernels.rule_programs import Program, programs
from rewarded_lines.kernels.tensor_merge import TensorMerge

# Longer rows are ranked a block of them at a time, with the whole row in memory.
LONGEST = 1 << 18


@dataclass(frozen=True)
class FileMerge:
    """How one tensor of all outputs is made of files.

    Attributes:
        tensor: where it is.
        programs: see `Program`.
        unit: so many values are merged together, counted from the tensor's start: those of an operation, or a row.
    """

    tensor: FileTensor
    programs: Sequence[Program]
    unit: int

    def run(self, start: int, outputs: Sequence[Array]) -> bool:
        """Fill an array for each output from the tensor's `start`-th value on; return False as `FileTensor.read`."""
        unit, last = self.unit, start + outputs[0].size
        inner = range(-(-start // unit) * unit, last // unit * unit)
        if inner and not self._read(inner, [out[inner.start - start :] for out in outputs]):
            return False
        units = {place // unit * unit for place in (start, last - 1) if place not in inner}
        return all(self._one(first, start, outputs) for first in sorted(units))

    def _read(self, inner: range, outputs: Sequence[Array]) -> bool:
        """Fill the outputs with whole units, in pieces that stay in cache."""
        piece = max(1, kernels.compiled_files().PIECE // self.unit) * self.unit
        buffers = self.tensor.buffers(min(len(inner), piece))
        calls = self._ranks(buffers)
        for each in self.programs:
            targets = [outputs[index] for index in each.outputs]
            calls.append(Call(each.loop, each.parameters, targets, len(targets)))
        return self.tensor.read(inner, calls, buffers)

    def _ranks(self, buffers: list[Array]) -> list[Call]:
        """Return what ranks the values in the first buffers; add buffers for the ranks."""
        calls, kinds, size = [], [buffer.dtype.name for buffer in buffers], buffers[0].size
        for row, width in (mask.ranked for mask in self.programs[0].ranked if mask.ranked):
            ranks = kernels.row_ranks()
            buffers.append(np.empty(size, np.uint32))
            parameters = np.array([0, row + 1, width])
            calls.append(
                Call(ranks.ranker((kinds[0], kinds[row + 1])), parameters, [buffers[-1], *ranks.scratch(width)])
            )
        return calls

    def _one(self, first: int, start: int, outputs: Sequence[Array]) -> bool:
        """Fill the outputs where they have a part of a unit of values."""
        name, sources = self.tensor.name, self.tensor.sources
        count = min(self.unit, sources[0].tensors[name].elements - first)
        values = [source.read(name, first, count) for source in sources]
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
    tensor = file_tensor(sources, name)
    made = programs(steps, tensor.kinds) if tensor else None
    if tensor is None or made is None:
        return None
    lanes = kernels.machine_code().LANES
    (unit,) = {mask.ranked[1] for mask in made[0].ranked if mask.ranked} or {lanes}
    return None if unit % lanes or unit > LONGEST else FileMerge(tensor, made, unit)

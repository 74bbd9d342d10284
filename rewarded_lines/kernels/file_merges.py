"""Merges of tensors in files: read, merged and rounded into the outputs' memory by one call of machine code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rewarded_lines.checkpoints.reader import TensorFiles
from rewarded_lines.kernels import kernels
from rewarded_lines.kernels.blocks import Array, Source
from rewarded_lines.kernels.rule_programs import Program, programs
from rewarded_lines.kernels.tensor_merge import TensorMerge


@dataclass(frozen=True)
class FileMerge:
    """How one tensor of all outputs is made of files.

    Attributes:
        name: of the tensor.
        sources: the base and the policies.
        files: a descriptor of each one's file.
        places: where the tensor begins in each.
        programs: see `Program`; none of their masks needs more than the code.
    """

    name: str
    sources: Sequence[TensorFiles]
    files: Array
    places: Array
    programs: Sequence[Program]

    def run(self, start: int, outputs: Sequence[Array]) -> bool:
        """Fill an array for each output from the tensor's `start`-th value on.

        Return False if a value may not be finite, or a file gave fewer bytes: then the arrays mean nothing.
        """
        lanes, last = kernels.machine_code().LANES, start + outputs[0].size
        # Machine code takes whole groups of values, counted from the tensor's start.
        inner = range(-(-start // lanes) * lanes, last // lanes * lanes)
        if inner and not self._read(inner, [out[inner.start - start :] for out in outputs]):
            return False
        groups = {place // lanes * lanes for place in (start, last - 1) if place not in inner}
        return all(self._group(group, lanes, start, outputs) for group in sorted(groups))

    def _read(self, inner: range, outputs: Sequence[Array]) -> bool:
        """Fill the outputs with whole groups, in pieces that stay in cache."""
        code, files = kernels.machine_code(), kernels.compiled_files()
        buffers = [np.empty(files.PIECE, source.tensors[self.name].dtype.storage) for source in self.sources]
        sizes = np.array([buffer.itemsize for buffer in buffers], np.int64)
        given = [self.files, self.places + inner.start * sizes, sizes, code.addresses(buffers)]
        targets = [code.addresses(outputs[index] for index in program.outputs) for program in self.programs]
        called = [
            np.array([program.loop.address for program in self.programs], np.int64),
            code.addresses(program.parameters for program in self.programs),
            code.addresses(targets),
            np.array([rows.size for rows in targets], np.int64),
        ]
        files_at, called_at = ([array.ctypes.data for array in arrays] for arrays in (given, called))
        read = files.reader(buffers[0].size)
        return not read(len(buffers), *files_at, len(targets), *called_at, len(inner), inner.start)

    def _group(self, first: int, lanes: int, start: int, outputs: Sequence[Array]) -> bool:
        """Fill the outputs where they have a part of a group of values."""
        info = self.sources[0].tensors[self.name]
        values = [source.read(self.name, first, min(lanes, info.elements - first)) for source in self.sources]
        made = [np.empty(values[0].size, out.dtype) for out in outputs]
        for program in self.programs:
            chosen = [made[index] for index in program.outputs]
            if not program.loop.run(values, program.parameters, chosen, first):
                return False
        for out, row in zip(outputs, made, strict=True):
            here = slice(max(start, first), min(start + out.size, first + row.size))
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
    if made is None or any(program.ranked for program in made):
        return None
    descriptors, places = np.array(runs, np.int64).T.copy()
    return FileMerge(name, files, descriptors, places, made)

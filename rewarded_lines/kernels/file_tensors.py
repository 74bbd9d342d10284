"""Tensors of files that machine code reads, piece by piece, past Python."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from rewarded_lines.checkpoints.reader import TensorFiles
from rewarded_lines.kernels import kernels
from rewarded_lines.kernels.blocks import Array, Source


class Call(NamedTuple):
    """A loop of machine code, and what it is called with.

    Attributes:
        loop: see `machine_code.Loop`.
        parameters: its numbers.
        targets: memory that it writes to.
        outputs: how many times its operations are done for each value.
    """

    loop: Any
    parameters: Array
    targets: Sequence[Array]
    outputs: int = 1


@dataclass(frozen=True)
class FileTensor:
    """One tensor of the base and the policies, each in one run of a file.

    Attributes:
        name: of the tensor.
        sources: the base and the policies.
        files: a descriptor of each one's file.
        places: where the tensor begins in each.
        kinds: its storage type in each.
    """

    name: str
    sources: Sequence[TensorFiles]
    files: Array
    places: Array
    kinds: tuple[np.dtype[Any], ...]

    def buffers(self, size: int) -> list[Array]:
        """Return memory for so many values of each source."""
        return [np.empty(size, kind) for kind in self.kinds]

    def read(self, values: range, calls: Sequence[Call], buffers: Sequence[Array]) -> bool:
        """Read some values of the tensor in pieces that fill the first buffers, and call loops on each piece.

        Return False if a value may not be finite, or a file gave fewer bytes: then targets mean nothing.
        """
        code, sizes = kernels.machine_code(), np.array([kind.itemsize for kind in self.kinds], np.int64)
        given = [self.files, self.places + values.start * sizes, sizes, code.addresses(buffers)]
        targets = [code.addresses(call.targets) for call in calls]
        called = [
            np.array([call.loop.address for call in calls], np.int64),
            code.addresses(call.parameters for call in calls),
            code.addresses(targets),
            np.array([call.outputs for call in calls], np.int64),
        ]
        files_at, called_at = ([array.ctypes.data for array in arrays] for arrays in (given, called))
        lengths = len(values), values.start, buffers[0].size
        return not kernels.compiled_files().reader()(len(self.sources), *files_at, len(calls), *called_at, *lengths)


def file_tensor(sources: Sequence[Source], name: str) -> FileTensor | None:
    """Return a tensor of files; None where a source has it otherwise, or work is too short for a compiler."""
    files = [source for source in sources if isinstance(source, TensorFiles)]
    if not kernels.is_long() or len(files) < len(sources):
        return None
    runs = [source.run(name) for source in files]
    if None in runs:
        return None
    kinds = tuple(source.tensors[name].dtype.storage for source in files)
    if not kernels.machine_code().supports(*kinds):
        return None
    descriptors, places = np.array(runs, np.int64).T.copy()
    return FileTensor(name, files, descriptors, places, kinds)

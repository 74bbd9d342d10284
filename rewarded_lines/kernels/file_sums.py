"""Weighted sums of tensors in files: read, summed and rounded into the outputs' memory by one call of machine code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rewarded_lines.checkpoints.reader import TensorFiles
from rewarded_lines.kernels import kernels
from rewarded_lines.kernels.blocks import Array, Source
from rewarded_lines.kernels.tensor_merge import TensorMerge

# Smaller factors could make a product zero.
_LEAST_FACTOR = 1e-200


@dataclass(frozen=True)
class FileSum:
    """How one tensor of all outputs is made of files.

    Attributes:
        files: a descriptor of the base's file and of each policy's.
        places: where the tensor begins in each.
        weights: [sums, policies] the factors of every sum, times the schedule's scale.
        order: the outputs, those that are sums first.
        copied: the source of each other output.
        stored: the type in the files.
        code: see `compiled_files.write_files`.
    """

    files: Array
    places: Array
    weights: Array
    order: Sequence[int]
    copied: Array
    stored: np.dtype[Any]
    code: Any

    def run(self, start: int, outputs: Sequence[Array]) -> bool:
        """Fill an array for each output from the tensor's `start`-th value on.

        Return False if a result may not be finite, or a file gave fewer bytes: then the arrays mean nothing.
        """
        sums = kernels.compiled_sums()
        buffers = np.empty((len(self.files), sums.PIECE), self.stored)
        places = self.places + start * self.stored.itemsize
        targets, rows = sums.addresses(outputs[index] for index in self.order), sums.addresses(buffers)
        given = (self.files, places, rows, self.weights, targets)
        numbers = len(self.weights), len(self.copied), self.copied.ctypes.data, outputs[0].size
        return bool(self.code(*(array.ctypes.data for array in given), *numbers) <= sums.LARGEST)


def file_sum(sources: Sequence[Source], name: str, steps: Sequence[TensorMerge]) -> FileSum | None:
    """Return how a tensor of all outputs is made of files in one pass; None if that needs more than sums and copies.

    One of the outputs must be a sum of all policies: its values show that those of the inputs are finite.
    """
    runs = [source.run(name) if isinstance(source, TensorFiles) else None for source in sources]
    joined = [index for index, step in enumerate(steps) if step.copy is None]
    longest = max((steps[index].rows for index in joined), key=len, default=())
    if not kernels.is_long() or None in runs or len(longest) < len(sources) - 1:
        return None
    dtypes = {source.tensors[name].dtype for source in sources}
    wanted = {step.dtype for step in steps}
    copied = [index for index, step in enumerate(steps) if step.copy is not None]
    if len(dtypes) > 1 or len(wanted) > 1 or (copied and dtypes != wanted):
        return None
    (stored,), (made,) = ([dtype.storage for dtype in each] for each in (dtypes, wanted))
    weights = _weights([steps[index] for index in joined], longest)
    sums = kernels.compiled_sums()
    if weights is None or not sums.supports(stored, made):
        return None
    # The sources in the order of the sum.
    files, places = np.array([runs[0], *(runs[row + 1] for row in longest)], np.int64).T.copy()
    place = {0: 0, **{row + 1: number + 1 for number, row in enumerate(longest)}}
    origins = np.array([place[steps[index].copy or 0] for index in copied], np.int64)
    code = sums.machine_code(len(longest), stored.name, made.name)["files"]
    return FileSum(files, places, weights, [*joined, *copied], origins, stored, code)


def _weights(steps: Sequence[TensorMerge], rows: Sequence[int]) -> Array | None:
    """Return the factors of every sum, 0 for a policy that is not in it; None if that could change a bit.

    A term of 0 changes no sum but −0, which is lost where the base has −0, too. Then no term with a positive factor is
    −0: it would need a policy's −0, whose difference from the base's −0 is +0.
    """
    found = np.zeros((len(steps), len(rows)))
    for factors, step in zip(found, steps, strict=True):
        own = np.array(step.weights) * step.scale
        if not step.linear or [row for row in rows if row in step.rows] != list(step.rows):
            return None
        if len(step.rows) < len(rows) and not (own >= _LEAST_FACTOR).all():
            return None
        factors[[row in step.rows for row in rows]] = own
    return found

"""How far a checkpoint lies from its base: sums over every tensor, read in blocks. No schedule, no places.

The sums of blocks are added exactly (`math.fsum`): they are the same for any number of threads and any sharding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from threading import Lock
from typing import NamedTuple

import numpy as np

from rewarded_lines.checkpoints.headers import TensorInfo
from rewarded_lines.checkpoints.reader import TensorFiles, total_bytes
from rewarded_lines.measuring.sums import exact_sum
from rewarded_lines.progress import Progress
from rewarded_lines.streaming import kernels
from rewarded_lines.streaming.blocks import BLOCK, Array, Source, Workspace, all_blocks
from rewarded_lines.streaming.pool import share_out


class Distance(NamedTuple):
    """Of a block or a tensor: Σ τ² and Σ θ_base², values that differ from the base's, values that are not finite."""

    residual: float
    base: float
    changed: int
    nonfinite: int


def distances(
    base: TensorFiles, source: Source, infos: Mapping[str, TensorInfo], progress: Progress
) -> dict[str, Distance]:
    """Return how far every floating-point tensor lies from the base's, several blocks read at a time.

    Args:
        base: the SFT model.
        source: what was made of it.
        infos: the tensors to look at, as the source has them.
        progress: is told of the bytes that are read.
    """
    names = [name for name, info in infos.items() if info.dtype.floating]
    parts: dict[str, list[Distance]] = {name: [] for name in names}
    lock = Lock()
    progress.expect(total_bytes(infos[name] for name in names))
    progress.start("reading blocks", counted=True)

    def worker() -> Callable[[tuple[str, int, int]], None]:
        workspace, wide = Workspace(base, [source]), np.empty(BLOCK)

        def work(block: tuple[str, int, int]) -> None:
            workspace.load(*block)
            name, _, count = block
            part = _measure_block(workspace, wide[:count])
            with lock:
                parts[name].append(part)
            progress.advance(count * infos[name].dtype.itemsize)

        return work

    share_out(all_blocks(names, infos), worker)
    return {name: _joined(blocks) for name, blocks in parts.items()}


def _measure_block(workspace: Workspace, wide: Array) -> Distance:
    residual = workspace.residuals()[0]
    # Values that are not finite are counted, and said in the notes.
    with np.errstate(all="ignore"):
        changed = int(np.count_nonzero(residual))
        square = float(np.multiply(residual, residual, out=wide).sum())
        kernels.cast(workspace.raw(0), wide)
        square_base = float(np.multiply(wide, wide, out=wide).sum())
    finite = math.isfinite(square) and math.isfinite(square_base)
    nonfinite = 0 if finite else workspace.count_nonfinite(0) + workspace.count_nonfinite(1)
    return Distance(square, square_base, changed, nonfinite)


def _joined(parts: Sequence[Distance]) -> Distance:
    return Distance(
        exact_sum(part.residual for part in parts),
        exact_sum(part.base for part in parts),
        sum(part.changed for part in parts),
        sum(part.nonfinite for part in parts),
    )

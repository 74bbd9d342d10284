"""Several workers that merge together: each merges a part of every tensor, then all get the whole one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

from rewarded_lines.kernels.blocks import BLOCK

# How a worker fares, the worst last: `Share.agree` returns the worst of all workers.
WELL, FULL, FAILED = 0, 1, 2


class _WorkerFailed(Exception):
    """Another worker has failed."""


class Share:
    """A worker's part of every tensor: a run of whole blocks, so that random masks are drawn as for a whole tensor."""

    def __init__(self, group: Any = None, rank: int = 0, size: int = 1, cpu_group: Any = None) -> None:
        """Bind groups of torch.distributed, for tensors and for words; without them the worker merges all by itself."""
        self.size = size
        self._group, self._rank, self._cpu_group = group, rank, cpu_group

    def part(self, elements: int) -> tuple[int, int]:
        """Return start and length of this worker's part of a tensor."""
        length = self._length(elements)
        start = min(self._rank * length, elements)
        return start, min(length, elements - start)

    def agree(self, state: int) -> int:
        """Return the worst state of all workers; all call this together, in the block of `together`."""
        if self.size == 1:
            return state
        worst = torch.tensor([state])
        torch.distributed.all_reduce(worst, torch.distributed.ReduceOp.MAX, group=self._cpu_group)
        if worst == FAILED != state:
            raise _WorkerFailed
        return int(worst)

    @contextmanager
    def together(self) -> Iterator[None]:
        """End the block on all workers if it fails on one, which tells why; others would wait for it forever."""
        with suppress(_WorkerFailed):
            try:
                yield
            except _WorkerFailed:
                raise
            except BaseException:
                self.agree(FAILED)
                raise
            self.agree(WELL)

    def room(self, part: torch.Tensor, elements: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return this worker's part as long as every worker's, and room for the whole tensor, flat."""
        if self.size == 1:
            return part, part
        length = self._length(elements)
        mine = part.new_zeros(length)
        mine[: part.numel()] = part
        return mine, part.new_empty(self.size * length)

    def joined(self, mine: torch.Tensor, whole: torch.Tensor, elements: int) -> torch.Tensor:
        """Fill what `room` returned with all workers' parts; all workers call this together."""
        if self.size > 1:
            # As bytes: not every backend knows every type. From torch 2.13 the function has a new name.
            gather = getattr(torch.distributed, "all_gather_single", torch.distributed.all_gather_into_tensor)
            gather(whole.view(torch.uint8), mine.view(torch.uint8), group=self._group)
        return whole[:elements]

    def summed(self, counts: list[int], device: torch.device) -> list[int]:
        """Return the sums of all workers' counts; all workers call this together."""
        if self.size == 1:
            return counts
        total = torch.tensor(counts, dtype=torch.int64, device=device)
        torch.distributed.all_reduce(total, group=self._group)
        return [int(count) for count in total.tolist()]

    def _length(self, elements: int) -> int:
        return elements if self.size == 1 else -(-elements // (self.size * BLOCK)) * BLOCK


def share_of(worker: Any) -> Share:
    """Return the share of one of vLLM's workers among those that split its layers over GPUs."""
    if worker.device.type == "cpu" or worker.parallel_config.tensor_parallel_size == 1:
        return Share()
    from vllm.distributed.parallel_state import get_tp_group

    group = get_tp_group()
    return Share(group.device_group, group.rank_in_group, group.world_size, group.cpu_group)

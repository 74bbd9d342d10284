"""The stream that writes whole models: blocks are read, hashed, merged and written, each tensor of all outputs once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from rewarded_lines.checkpoints.hashing import RunningHashes
from rewarded_lines.checkpoints.reader import TensorFiles
from rewarded_lines.checkpoints.writer import CheckpointWriter
from rewarded_lines.kernels.blocks import BLOCK, Source, Workspace, blocks_of
from rewarded_lines.kernels.file_merges import FileMerge, file_merge
from rewarded_lines.kernels.nonfinite import NonFinite
from rewarded_lines.kernels.tensor_merge import AT_ONCE, TensorMerge
from rewarded_lines.kernels.thread_pool import Relay, cores, share_out
from rewarded_lines.progress import Progress

# Blocks that a thread takes at a time where machine code reads the files, of all outputs together.
_RUN = 8
# Threads beside those that compute: as many wait for the disk.
_WAITING = 2


class _Run(NamedTuple):
    """A part of a tensor; `merge` if machine code can make it of the files."""

    name: str
    start: int
    length: int
    merge: FileMerge | None

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Yield start and length of the run's blocks."""
        for start, count in blocks_of(self.length):
            yield self.start + start, count


@dataclass
class BlockStream:
    """Writes tensors of all outputs: threads read and hash in turn, and merge in parallel.

    Attributes:
        sources: the base and the policies.
        steps: how each output's tensor is made, by name.
        writers: one for each output, all of one layout.
        hashes: takes the values of files that are not hashed yet.
        nonfinite: counts values that are not finite.
        progress: is told of the bytes of each block.
        workspace: makes a thread's buffers.
        plain: whether machine code may read the files, past the workspace.
    """

    sources: Sequence[Source]
    steps: Mapping[str, Sequence[TensorMerge]]
    writers: Sequence[CheckpointWriter]
    hashes: RunningHashes
    nonfinite: NonFinite
    progress: Progress
    workspace: Callable[[], Workspace]
    plain: bool
    _itemsize: dict[str, int] = field(default_factory=dict)

    def write(self, order: Sequence[str]) -> None:
        """Write tensors in an order, best that of the files."""
        queue = list(self._runs(order))
        relay = Relay(queue)

        def worker() -> Callable[[object], None]:
            workspace = self.workspace()

            def work(_: object) -> None:
                run = relay.take(
                    lambda run: None if run.merge else workspace.load(*run[:3]),
                    lambda: self.hashes.take(workspace.stored()),
                )
                if run.merge is None:
                    self._merge(run, workspace)
                elif not self._straight(run, run.merge):
                    for start, count in run.blocks():
                        workspace.load(run.name, start, count)
                        self._merge(_Run(run.name, start, count, None), workspace)
                self.progress.advance(run.length * self._itemsize[run.name])

            return work

        # The queue only counts the runs: each thread takes its next one from the relay.
        share_out(queue, worker, cores() + _WAITING)

    def _runs(self, order: Sequence[str]) -> Iterator[_Run]:
        """Yield the runs of all tensors; those without a workspace are longer than a block."""
        base = self.sources[0]
        for name in order:
            info = base.tensors[name]
            self._itemsize[name] = info.dtype.itemsize
            merge = file_merge(self.sources, name, self.steps[name]) if self._known(name) else None
            length = BLOCK * (max(1, _RUN // len(self.writers)) if merge else 1)
            for start in range(0, info.elements, length):
                yield _Run(name, start, min(length, info.elements - start), merge)

    def _known(self, name: str) -> bool:
        """Return whether no hash needs a tensor's values, and no GPU takes them."""
        files = [source for source in self.sources if isinstance(source, TensorFiles) and name in source.tensors]
        return self.plain and all(self.hashes.knows(source.tensors[name].file) for source in files)

    def _straight(self, run: _Run, merge: FileMerge) -> bool:
        """Merge a run of files straight into the memory of the outputs; return False if that did not work."""
        name, start, count, _ = run
        lent = [writer.lend(name, start, count) for writer in self.writers]
        if not all(lent):
            return False
        done = start
        # All outputs have one layout, so their parts are alike.
        for parts in zip(*lent, strict=True):
            if not merge.run(done, parts):
                return False
            done += parts[0].size
        for writer in self.writers:
            writer.take_back(name, start, count)
        return True

    def _merge(self, run: _Run, workspace: Workspace) -> None:
        """Write the block that is loaded."""
        steps, found = self.steps[run.name], []
        for first in range(0, len(self.writers), AT_ONCE):
            merged = workspace.merge(steps[first : first + AT_ONCE])
            for writer, (values, bad) in zip(self.writers[first:], merged, strict=False):
                writer.write(run.name, run.start, values)
                found.append(bad)
        # Once for all outputs: it counts the inputs.
        self.nonfinite.look(workspace, run.name, steps, found)

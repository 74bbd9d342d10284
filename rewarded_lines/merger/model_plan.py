"""Merges into whole models: the steps for every tensor, and the stream of blocks that writes the outputs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rewarded_lines.checkpoints.adapters import Adapter, BareBase
from rewarded_lines.checkpoints.dtypes import F32, DType, as_torch, widest
from rewarded_lines.checkpoints.hashing import RunningHashes
from rewarded_lines.checkpoints.headers import TensorInfo
from rewarded_lines.checkpoints.reader import Checkpoint, TensorFiles, total_bytes
from rewarded_lines.checkpoints.tensor_depth import Depths
from rewarded_lines.checkpoints.writer import CheckpointWriter
from rewarded_lines.errors import fail
from rewarded_lines.folders import write_json
from rewarded_lines.kernels import kernels
from rewarded_lines.kernels.block_stream import BlockStream
from rewarded_lines.kernels.blocks import Source, Workspace, blocks_of
from rewarded_lines.kernels.nonfinite import NonFinite
from rewarded_lines.kernels.norms import Facts
from rewarded_lines.kernels.tensor_merge import TensorMerge
from rewarded_lines.kernels.thread_pool import share_out
from rewarded_lines.merger.lora_folding import FoldedAdapter
from rewarded_lines.merger.merge_device import settled_device
from rewarded_lines.merger.merge_rules import soup
from rewarded_lines.merger.methods import METHODS
from rewarded_lines.merger.plan import Plan
from rewarded_lines.merger.spec import MergeSpec
from rewarded_lines.progress import SILENT, Progress

if TYPE_CHECKING:
    import torch


class ModelPlan(Plan):
    """Merges policies, whole models or adapters folded into their base, into whole models."""

    kind = "full"

    def __init__(
        self,
        base: Checkpoint | BareBase,
        policies: Mapping[str, Checkpoint | Adapter],
        names: Sequence[str],
        depths: Depths,
        dtype: str = "auto",
        device: str = "cpu",
    ) -> None:
        """Bind the inputs; `plan_merge` returns a checked plan.

        `names` are the tensors to write, in order. The dtype "auto" gives each tensor its widest type in the inputs;
        low-rank factors do not count.
        """
        super().__init__(base, policies, depths, dtype)
        self.names = names
        self._device = device
        self._sources: list[Source] = [
            FoldedAdapter(policy, base) if isinstance(policy, Adapter) else policy for policy in policies.values()
        ]
        everyone = [1.0] * len(policies)
        floats = [name for name in names if base.tensors[name].dtype.floating]
        # Whole models may lack some of them; adapters change few, and count as they would as whole models.
        adapted = any(isinstance(policy, Adapter) for policy in policies.values())
        self._floats = [name for name in floats if adapted or self._touched(name, everyone)]
        self.facts = Facts(base, self._sources, self._floats)

    @property
    def sources(self) -> list[Source]:
        """Return the base and each policy, as residuals if it is an adapter."""
        return [self.base, *self._sources]

    def workspace(self) -> Workspace:
        """Return buffers for one thread."""
        if self._device in ("cpu", "auto"):
            return Workspace(self.base, self._sources)
        from rewarded_lines.kernels.gpu_blocks import DeviceWorkspace

        return DeviceWorkspace(self.base, self._sources, self._device)

    def nonfinite(self) -> NonFinite:
        """Return a new count of values that are not finite."""
        return NonFinite(list(self.policies), self.base.tensors)

    def outputs(self, _: MergeSpec | None = None) -> list[TensorInfo]:
        """See `Plan.outputs`; they are the same for every spec."""
        return [TensorInfo(name, self._output_dtype(name), self.base.tensors[name].shape) for name in self.names]

    def rank(self, _: MergeSpec) -> None:
        """See `Plan.rank`."""

    def prepare(self, specs: Sequence[MergeSpec]) -> None:
        """See `Plan.prepare`."""
        rows = [(METHODS[spec.method], spec) for spec in specs]
        measured = [spec for row, spec in rows if row.measure or row.weigh or len(spec.weights) > 2]
        if measured:
            kernels.expect(sum(self.base.tensors[name].elements for name in self._floats))
        for spec in measured:
            if spec.options.get("scope") == "model" and self._floats:
                # One number for all tensors: all threads measure it together.
                self.step(self._floats[0], spec, copies=False)
        if measured:
            self.facts.prepare(lambda name: [self.step(name, spec) for spec in measured])

    def step(self, name: str, spec: MergeSpec, copies: bool = True) -> TensorMerge:
        """Return the merge of one tensor for one output.

        If the result equals an input's tensor exactly, that is copied, unless `copies` is False.
        """
        dtype = self._output_dtype(name)
        if not self.base.tensors[name].dtype.floating:
            return TensorMerge(dtype, copy=0)
        row = METHODS[spec.method]
        weights = row.factors(spec.weights)
        weights = row.weigh(weights, self.facts.gram(name)) if row.weigh else weights
        weights, scale = self.folded(name, spec, weights)
        if copies:
            if all(weight * scale == 0 for weight in weights) or not self._touched(name, weights):
                return TensorMerge(dtype, copy=0)
            same = row.copies(spec.options, weights)
            if same is not None and weights[same] * scale == 1 and name in self._sources[same].tensors:
                return TensorMerge(dtype, copy=same + 1)
        rows = [i for i in self._order(name, weights) if weights[i] != 0 or row.everyone]
        measured = dict(row.measure(self.facts, name, rows, spec.options)) if row.measure else {}
        masks = measured.pop("kept", ())
        parameters = {**row.parameters(spec.options), **measured}
        taken = tuple(weights[i] for i in rows)
        return TensorMerge(dtype, None, tuple(rows), taken, scale, row.rule, row.rule is soup, parameters, masks)

    def auto_alpha(self, specs: Sequence[MergeSpec]) -> list[float]:
        """See `Plan.auto_alpha`."""
        self.prepare(specs)
        unweighted = [0.0] * len(self.policies)
        norms = self.facts.norms(
            lambda name: [self.step(name, spec, copies=False) for spec in specs],
            lambda name: self._order(name, unweighted),
        )
        if not all(0 < joined < math.inf and total < math.inf for total, joined in norms):
            what = "the merged residual is zero or not finite, no α can be chosen"
            raise fail(what, where="--alpha auto", remedy="give a number")
        return [total / joined / len(self.policies) for total, joined in norms]

    def matched_alpha(self, weights: Sequence[float], like: MergeSpec) -> float:
        """See `Plan.matched_alpha`."""
        row = METHODS[like.method]
        if not row.sums:
            return self._matched_by_measure(like)
        weights = row.factors(weights)
        self.facts.prepare(self.facts.gram)
        scaled: list[float] = []
        plain: list[float] = []
        for name in self._floats:
            gram, (own, scale) = self.facts.gram(name), self.folded(name, like, weights)
            for squares, taken, factor in ((plain, weights, 1.0), (scaled, own, scale)):
                square = sum(a * b * gram[i][j] for i, a in enumerate(taken) for j, b in enumerate(taken))
                squares.append(factor * factor * square)
        return _ratio(scaled, plain)

    def _matched_by_measure(self, like: MergeSpec) -> float:
        """Return the matched α of a method whose residual must be merged to be measured."""
        self.prepare([like])
        flat = replace(like, alpha=1.0, beta=0.0, lines=(), modules=())
        squares, plain = (
            self.facts.squares(lambda name, spec=spec: self.step(name, spec, copies=False))  # type: ignore[misc]
            for spec in (like, flat)
        )
        scaled = [self.step(name, like, copies=False).scale ** 2 * square for name, square in squares.items()]
        return _ratio(scaled, list(plain.values()))

    def tensors(
        self, spec: MergeSpec, order: Sequence[str] = (), workspace: Callable[[], Workspace] | None = None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield every merged tensor as torch's, in `order` or in the base's; refuse values that are not finite.

        `workspace` makes a thread's buffers, if not those of the plan.
        """
        self.prepare([spec])
        shapes = {info.name: info for info in self.outputs()}
        for name in order or self.names:
            info = shapes[name]
            values = np.empty(info.elements, info.dtype.storage)
            nonfinite = self.nonfinite()
            fill = partial(self._fill, name, spec, values, nonfinite, workspace or self.workspace)
            share_out(list(blocks_of(info.elements)), fill)
            nonfinite.refuse()
            yield name, as_torch(values.reshape(info.shape), info.dtype)

    def _fill(
        self, name: str, spec: MergeSpec, values: Any, nonfinite: NonFinite, begin: Callable[[], Workspace]
    ) -> Callable[[tuple[int, int]], None]:
        workspace, step = begin(), self.step(name, spec)

        def work(block: tuple[int, int]) -> None:
            start, count = block
            workspace.load(name, start, count)
            ((values[start : start + count], bad),) = workspace.merge([step])
            nonfinite.look(workspace, name, [step], [bad])

        return work

    def write(
        self, specs: Sequence[MergeSpec], folders: Sequence[Path], max_shard_size: int, progress: Progress = SILENT
    ) -> NonFinite:
        """See `Plan.write`."""
        if self._device == "auto":
            ruled = sum(METHODS[spec.method].rule is not soup for spec in specs)
            values = ruled * sum(self.base.tensors[name].elements for name in self._floats)
            self._device = settled_device(values, len(self.policies), progress)
        nonfinite = self.nonfinite()
        hashes = RunningHashes(source for source in [self.base, *self._sources] if isinstance(source, TensorFiles))
        with ExitStack() as stack:
            infos = self.outputs()
            made = (CheckpointWriter(folder, infos, max_shard_size, together=len(folders)) for folder in folders)
            writers = [stack.enter_context(writer) for writer in made]
            self._stream(specs, writers, hashes, nonfinite, progress)
        hashes.remember()
        config = {**self.carried.config(self.base.config), "dtype": self._loaded_as(infos).torch}
        config.pop("torch_dtype", None)
        for folder in folders:
            self.carried.copy(folder)
            write_json(folder / "config.json", config)
        return nonfinite

    def _loaded_as(self, infos: Sequence[TensorInfo]) -> DType:
        """Return the type for the config, in which loaders hold all weights: the widest that was written.

        Where the base itself has wider tensors among the others (routers' biases, states of Mamba) it is the type of
        most values, as in the base's config.
        """
        floats = [info for info in infos if info.dtype.floating]
        if not floats or any(info.dtype != self.base.tensors[info.name].dtype for info in floats):
            return widest([info.dtype for info in floats] or [F32])
        sizes = Counter[DType]()
        for info in floats:
            sizes[info.dtype] += info.elements
        return sizes.most_common(1)[0][0]

    def _stream(
        self,
        specs: Sequence[MergeSpec],
        writers: Sequence[CheckpointWriter],
        hashes: RunningHashes,
        nonfinite: NonFinite,
        progress: Progress,
    ) -> None:
        """Pass every block through all specs."""
        order, tensors = writers[0].order, self.base.tensors
        steps = {name: [self.step(name, spec) for spec in specs] for name in order}
        progress.expect(total_bytes(tensors[name] for name in order))
        progress.start("merging blocks", counted=True)
        kernels.expect(sum(tensors[name].elements for name in order))
        plain = self._device in ("cpu", "auto")
        stream = BlockStream(self.sources, steps, writers, hashes, nonfinite, progress, self.workspace, plain)
        stream.write(order)

    def _touched(self, name: str, weights: Sequence[float]) -> bool:
        """True if a policy with a weight may differ from the base: adapters change few tensors.

        A model that lacks a tensor holds the base's.
        """
        mine = self.base.tensors[name]
        taken = (source for source, weight in zip(self._sources, weights, strict=False) if weight)
        return any(
            source.tensors[name] is not mine if isinstance(source, TensorFiles) else source.touches(name)
            for source in taken
        )

    def _order(self, name: str, weights: Sequence[float]) -> list[int]:
        """Return the order of summation: by content, so that permuting the policies changes no bit."""
        rows = range(len(weights))
        if len(weights) <= 2:
            return list(rows)
        digests = self.facts.digests(name)
        return sorted(rows, key=lambda i: (digests[i], weights[i]))

    def _output_dtype(self, name: str) -> DType:
        dtype = self.base.tensors[name].dtype
        if not dtype.floating:
            return dtype
        stored = [source.tensors[name].dtype for source in self._sources if name in source.tensors]
        return self._dtype or widest([dtype, *stored])


def _ratio(scaled: Sequence[float], plain: Sequence[float]) -> float:
    """Return √(Σ scaled / Σ plain) of squares; 1 if there is nothing to scale."""
    total = math.fsum(plain)
    return math.sqrt(max(0.0, math.fsum(scaled)) / total) if total > 0 else 1.0

"""Engines that load merged adapters beside one base: written when needed, removed after use."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
import weakref
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rewarded_lines.checkpoints.dtypes import F32
from rewarded_lines.engines.base import Generator, Model
from rewarded_lines.folders import scratch_folder
from rewarded_lines.merger.adapter_plan import AdapterPlan
from rewarded_lines.merger.spec import MergeSpec
from rewarded_lines.trace import span

_MEMORY = Path("/dev/shm")


class AdapterGenerator(Generator):
    """An engine that loads merged adapters from folders; without a plan only the SFT model answers."""

    _plan: AdapterPlan | None
    _folders: AdapterFolders | None = None

    @abstractmethod
    def _load(self, source: Any) -> Any:
        """Load an adapter from its folder, or a merge without folders; return the engine's name for it.

        Raises:
            UserError: the engine refuses the adapter, or ignores modules of it.
        """

    @abstractmethod
    def _unload(self, name: Any) -> None: ...

    def _worth_mixing(self, requests: int) -> int:
        """Return how many adapters should share a batch if each gets so many requests."""
        return self.at_once

    def _chunks(self, models: Sequence[Model], requests: int) -> Iterator[list[Model]]:
        most = min(self.at_once, self._worth_mixing(requests))
        chunk: list[Model] = []
        adapters = 0
        for model in models:
            one = int(self._needs_adapter(model))
            if adapters + one > most:
                yield chunk
                chunk, adapters = [], 0
            chunk.append(model)
            adapters += one
        if chunk:
            yield chunk

    def _needs_adapter(self, model: Model) -> bool:
        """Return whether a model is a merge that differs from the base."""
        if model is None:
            return False
        assert self._plan is not None, "without a plan there is only the SFT model"
        output = self._plan.output(model)
        return bool(output.whole) or any(stack.parts for stack in output.stacks.values())

    @contextmanager
    def _loaded(self, models: Sequence[Model], layer: str = "") -> Iterator[list[Any]]:
        """Load the models' adapters, or only the modules whose names end with `layer`, for the block."""
        started = time.perf_counter()
        wanted = [model for model in models if model is not None and self._needs_adapter(model)]
        names: list[Any] = []
        sources: Sequence[Any] = ()
        try:
            with span("load adapters", adapters=len(wanted)):
                sources = self._folders.write(wanted, layer) if self._folders and wanted else wanted
                for source in sources:
                    names.append(self._load(source))
            self.swap_seconds += time.perf_counter() - started
            left = iter(names)
            yield [next(left) if self._needs_adapter(model) else None for model in models]
        finally:
            for name in names:
                self._unload(name)
            for source in sources:
                if isinstance(source, Path):
                    shutil.rmtree(source, ignore_errors=True)


class AdapterFolders:
    """A folder of merged adapters. It goes with this object or at Python's exit; after a kill, with the next one."""

    def __init__(self, plan: AdapterPlan, place: Path | None = None) -> None:
        """Make the folder in `place`; by default in memory, for this user only, or with temporary files."""
        # Engines read α and r but no patterns, which a policy's own settings may have.
        self._plan = plan.without_repeats()
        self._stack = ExitStack()
        # A name for each user: nobody can remove another user's files.
        name = f"rewarded-lines-adapters-{os.getuid()}"
        self.folder = self._stack.enter_context(scratch_folder((place or _place(plan)) / name))
        if place is None:
            self.folder.chmod(0o700)
        self.close = weakref.finalize(self, self._stack.close)
        self._count = 0

    def write(self, specs: Sequence[MergeSpec], layer: str = "") -> list[Path]:
        """Write merged adapters and return their folders; each input is read once for all of them.

        Args:
            specs: one for each adapter.
            layer: write only the modules whose names end with it; "" writes all.

        Raises:
            UserError: a tensor of the inputs or of a result is not finite.
        """
        folders = [self.folder / str(self._count + index) for index in range(len(specs))]
        self._count += len(specs)
        for folder in folders:
            folder.mkdir()
        plan = self._plan.only(layer) if layer else self._plan
        plan.prepare(specs)
        plan.write(specs, folders, max_shard_size=1 << 62).refuse()
        return folders


def adapted_layers(plan: AdapterPlan) -> list[str]:
    """Return the last parts of the modules' names, e.g. q_proj."""
    return sorted({name.rpartition(".")[2] for name in plan.modules})


def adapter_bytes(plan: AdapterPlan, rank: int = 0, itemsize: int = F32.itemsize) -> int:
    """Return the bytes of the largest merged adapter, in float32 by default, or of one with `rank` in every module."""
    size = 0
    for modules in plan.modules.values():
        like = next(iter(modules.values()))
        width = (rank or sum(one.rank for one in modules.values())) * max(1, like.experts)
        size += width * (like.a.shape[1] + like.b.shape[0])
    return size * itemsize


def _place(plan: AdapterPlan) -> Path:
    """Return /dev/shm if it has room for 64 adapters, else the folder of temporary files."""
    needed = 64 * adapter_bytes(plan)
    if _MEMORY.is_dir() and os.access(_MEMORY, os.W_OK | os.X_OK) and shutil.disk_usage(_MEMORY).free > needed:
        return _MEMORY
    return Path(tempfile.gettempdir())

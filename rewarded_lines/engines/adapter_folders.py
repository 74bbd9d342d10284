"""Merged adapters on disk, for engines that load them from there: written when needed, removed after use."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rewarded_lines.checkpoints.dtypes import F32
from rewarded_lines.engines.base import Model
from rewarded_lines.folders import scratch_folder
from rewarded_lines.merger.adapter_plan import AdapterPlan
from rewarded_lines.merger.spec import MergeSpec

_MEMORY = Path("/dev/shm")
_ONE_FILE = 1 << 62


class AdapterFolders:
    """A folder of merged adapters. It is removed with this object or with Python; after a kill, by the next one.

    Attributes:
        seconds: spent so far on writing and loading adapters.
    """

    def __init__(self, plan: AdapterPlan, place: Path | None = None) -> None:
        """Make the folder in `place`, by default in /dev/shm (for this user only) or with other temporary files."""
        self.seconds = 0.0
        # Engines read α and r but no patterns, which a policy's own settings may have.
        self._plan = plan.without_repeats()
        self._stack = ExitStack()
        # Each user has a name of their own: nobody can remove another user's files.
        name = f"rewarded-lines-adapters-{os.getuid()}"
        self.folder = self._stack.enter_context(scratch_folder((place or _place(plan)) / name))
        if place is None:
            self.folder.chmod(0o700)
        self.close = weakref.finalize(self, self._stack.close)
        self._count = 0

    def write(self, specs: Sequence[MergeSpec], layer: str = "") -> list[Path]:
        """Write merged adapters and return their folders. Each input is read once for all of them.

        Args:
            specs: the numbers of each adapter.
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
        plan.write(specs, folders, max_shard_size=_ONE_FILE).refuse()
        return folders

    def remove(self, folders: Sequence[Path]) -> None:
        """Remove adapters after their use."""
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)

    @contextmanager
    def loaded(
        self, models: Sequence[Model], load: Callable[[Path], Any], unload: Callable[[Any], Any], layer: str = ""
    ) -> Iterator[list[Any]]:
        """Write the models' adapters and load them; unload and remove them at the end of the block.

        Args:
            models: a merge each, or None for the base.
            load: loads a folder into the engine and returns the engine's name for it.
            unload: takes that name.
            layer: see `write`.

        Yields:
            What `load` returned for each model; None for those that are the base.
        """
        started = time.perf_counter()
        wanted = [model for model in models if model is not None and not changes_nothing(self._plan, model)]
        written = self.write(wanted, layer) if wanted else []
        names: list[Any] = []
        try:
            for folder in written:
                names.append(load(folder))
            self.seconds += time.perf_counter() - started
            left = iter(names)
            yield [None if model is None or changes_nothing(self._plan, model) else next(left) for model in models]
        finally:
            for name in names:
                unload(name)
            self.remove(written)


def changes_nothing(plan: AdapterPlan, spec: MergeSpec) -> bool:
    """Return whether a merged adapter is zero: the model with it is the base."""
    output = plan.output(spec)
    return not output.whole and not any(stack.parts for stack in output.stacks.values())


def adapted_layers(plan: AdapterPlan) -> list[str]:
    """Return the last parts of the modules' names, e.g. q_proj."""
    return sorted({name.rpartition(".")[2] for name in plan.modules})


def largest_rank(plan: AdapterPlan) -> int:
    """Return the largest Σ rᵢ of a module: no merged adapter has a larger rank."""
    return max(sum(one.rank for one in modules.values()) for modules in plan.modules.values())


def adapter_bytes(plan: AdapterPlan, rank: int = 0) -> int:
    """Return the bytes of a merged adapter in float32: of the largest one, or of one with `rank` in every module."""
    size = 0
    for modules in plan.modules.values():
        like = next(iter(modules.values()))
        size += (rank or sum(one.rank for one in modules.values())) * sum(like.shape)
    return size * F32.itemsize


def _place(plan: AdapterPlan) -> Path:
    """Return /dev/shm if it has room for 64 adapters, else the folder of temporary files."""
    needed = 64 * adapter_bytes(plan)
    if _MEMORY.is_dir() and os.access(_MEMORY, os.W_OK | os.X_OK) and shutil.disk_usage(_MEMORY).free > needed:
        return _MEMORY
    return Path(tempfile.gettempdir())

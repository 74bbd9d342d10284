"""Merged adapters on disk, for engines that load them from there: written, and gone when nobody needs them."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from rewarded_lines.checkpoints.dtypes import F32
from rewarded_lines.folders import scratch_folder
from rewarded_lines.planning.adapter_plan import AdapterPlan
from rewarded_lines.rules.spec import MergeSpec

_MEMORY = Path("/dev/shm")
_ONE_FILE = 1 << 62


class AdapterFolders:
    """A folder of merged adapters, which goes with this object or with Python; after a kill the next one clears it."""

    def __init__(self, plan: AdapterPlan, place: Path | None = None) -> None:
        """Make the folder.

        Args:
            plan: of the adapters.
            place: where; by default memory that serves as a disk, readable for this user only, or the usual place of
                temporary files.
        """
        # Engines read α and r, and no patterns, which a policy's own settings may have.
        self._plan = plan.without_repeats()
        self._stack = ExitStack()
        # Users do not share a name, so that none meets what another has left.
        name = f"rewarded-lines-adapters-{os.getuid()}"
        self.folder = self._stack.enter_context(scratch_folder((place or _place(plan)) / name))
        if place is None:
            self.folder.chmod(0o700)
        self.close = weakref.finalize(self, self._stack.close)
        self._count = 0

    def write(self, specs: Sequence[MergeSpec], layer: str = "") -> list[Path]:
        """Write merged adapters, each input read once for all of them; return their folders.

        Args:
            specs: of the adapters.
            layer: only of the modules whose names end so.

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
        """Remove adapters that are needed no longer."""
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)


def changes_nothing(plan: AdapterPlan, spec: MergeSpec) -> bool:
    """Say whether a merged adapter is zero, so that the model with it is the base."""
    output = plan.output(spec)
    return not output.whole and not any(stack.parts for stack in output.stacks.values())


def adapted_layers(plan: AdapterPlan) -> list[str]:
    """Return the last parts of the modules' names, e.g. q_proj."""
    return sorted({name.rpartition(".")[2] for name in plan.modules})


def largest_rank(plan: AdapterPlan) -> int:
    """Return Σ rᵢ of the module where it is largest: no merged adapter has a larger rank."""
    return max(sum(one.rank for one in modules.values()) for modules in plan.modules.values())


def adapter_bytes(plan: AdapterPlan, rank: int = 0) -> int:
    """Return the bytes of a merged adapter in float32: the largest there is, or one with a rank for all modules."""
    size = 0
    for modules in plan.modules.values():
        like = next(iter(modules.values()))
        size += (rank or sum(one.rank for one in modules.values())) * sum(like.shape)
    return size * F32.itemsize


def _place(plan: AdapterPlan) -> Path:
    """Return memory that serves as a disk if it holds some tens of adapters with ease, else the disk."""
    needed = 64 * adapter_bytes(plan)
    if _MEMORY.is_dir() and os.access(_MEMORY, os.W_OK | os.X_OK) and shutil.disk_usage(_MEMORY).free > needed:
        return _MEMORY
    return Path(tempfile.gettempdir())

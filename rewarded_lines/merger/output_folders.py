"""From a plan to complete folders on disk: weights, settings, `merge.json` and the model card, or nothing at all."""

from __future__ import annotations

import errno
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rewarded_lines.checkpoints.reader import total_bytes
from rewarded_lines.errors import UserError, fail, masked
from rewarded_lines.folders import atomic_folder, write_json
from rewarded_lines.merger.input_cards import CARD_FILE
from rewarded_lines.merger.model_card import CardAddition, model_card
from rewarded_lines.merger.plan import Plan
from rewarded_lines.merger.record import RECORD_FILE, describe, hash_inputs
from rewarded_lines.merger.spec import MergeSpec
from rewarded_lines.progress import SILENT, Progress

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_folders(
    plan: Plan,
    specs: Sequence[MergeSpec],
    targets: Sequence[Path],
    settings: Mapping[str, Any],
    *,
    max_shard_size: int,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    addition: Callable[[MergeSpec], CardAddition] | None = None,
    progress: Progress = SILENT,
) -> None:
    """Write one complete folder for each spec, or none; inputs are read once for all.

    Args:
        plan: the inputs.
        specs: the numbers of each output.
        targets: the folders to make.
        settings: what else decides the bytes, for `merge.json`.
        max_shard_size: bytes of the largest weight file.
        overwrite: replace existing folders.
        allow_nonfinite: let NaN and infinite values pass.
        addition: called once for each output, after all inputs have been read: what else its card shows.
        progress: hears of each step and of the bytes that are written.

    Raises:
        UserError: an output exists, the disk cannot hold them, or a tensor is not finite.
    """
    needed = sum(total_bytes(plan.outputs(spec)) for spec in specs)
    with _explained(needed, targets[0]), ExitStack() as stack:
        folders = [stack.enter_context(atomic_folder(target, overwrite)) for target in targets]
        if needed > shutil.disk_usage(folders[0]).free:
            raise _full(needed, folders[0].parent)
        nonfinite = plan.write(specs, folders, max_shard_size, progress)
        if not allow_nonfinite:
            nonfinite.refuse()
        progress.start("hashing inputs")
        inputs = hash_inputs(plan)
        for folder, spec in zip(folders, specs, strict=True):
            write_json(folder / RECORD_FILE, describe(plan, spec, inputs, settings))
            added = addition(spec) if addition else CardAddition()
            for name, content in added.files.items():
                (folder / name).write_bytes(content)
            (folder / CARD_FILE).write_text(model_card(plan, spec, settings, added), encoding="utf-8")
        progress.start("syncing to disk")


@contextmanager
def _explained(needed: int, target: Path) -> Iterator[None]:
    """Turn a disk that fills up during the merge, or a limit on file sizes, into one message."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise _full(needed, target.parent) from error


def _full(needed: int, place: Path) -> UserError:
    free = shutil.disk_usage(place).free
    return fail(
        "not enough disk space, or a limit on the size of files",
        where=str(place),
        expected=f"{needed:,} bytes ({needed / 1e9:.2f} GB) free",
        got=f"{free:,} bytes ({free / 1e9:.2f} GB)",
        remedy="choose another --out, fewer λ, or --dtype bfloat16",
    )


def command_line() -> list[str]:
    """Return the running command, its own path cut to the name and tokens masked (`--score` may hold one)."""
    return [Path(sys.argv[0]).name, *map(masked, sys.argv[1:])]

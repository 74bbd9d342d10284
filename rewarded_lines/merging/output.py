"""From a plan to folders on disk: the stream of blocks, and what a checkpoint needs beside its weights."""

from __future__ import annotations

import errno
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rewarded_lines.checkpoints.adapter_config import ADAPTER_CONFIG
from rewarded_lines.checkpoints.hashing import RunningHashes
from rewarded_lines.checkpoints.reader import total_bytes
from rewarded_lines.checkpoints.writer import CheckpointWriter
from rewarded_lines.errors import UserError, fail, masked
from rewarded_lines.folders import atomic_folder, write_json
from rewarded_lines.merging.cards import CardAddition, model_card
from rewarded_lines.merging.input_cards import CARD_FILE
from rewarded_lines.merging.provenance import RECORD_FILE, Plan, companions, describe, hash_inputs
from rewarded_lines.merging.stacking import AdapterWriter, adapter_config
from rewarded_lines.planning.adapters import AdapterPlan
from rewarded_lines.planning.plan import MergePlan, MergeSpec
from rewarded_lines.progress import SILENT, Progress
from rewarded_lines.streaming.blocks import all_blocks
from rewarded_lines.streaming.pool import Relay, share_out

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
        overwrite: replace folders that are there.
        allow_nonfinite: let NaN and infinite values pass.
        addition: called once for each output, when all inputs have been read: what else its card shows.
        progress: is told of the steps, and of the bytes that are written.

    Raises:
        UserError: an output exists, the disk cannot hold them, or a tensor is not finite.
    """
    needed = sum(total_bytes(plan.outputs(spec)) for spec in specs)
    with _explained(needed, targets[0]), ExitStack() as stack:
        folders = [stack.enter_context(atomic_folder(target, overwrite)) for target in targets]
        check_space(needed, folders[0])
        fill_folders(
            plan, specs, folders, max_shard_size=max_shard_size, allow_nonfinite=allow_nonfinite, progress=progress
        )
        progress.start("hashing inputs")
        inputs = hash_inputs(plan)
        for folder, spec in zip(folders, specs, strict=True):
            write_json(folder / RECORD_FILE, describe(plan, spec, inputs, settings))
            write_card(folder, plan, spec, settings, addition(spec) if addition else CardAddition())
        progress.start("syncing to disk")


def write_card(folder: Path, plan: Plan, spec: MergeSpec, settings: Mapping[str, Any], addition: CardAddition) -> None:
    """Write the model card, and the files that it shows."""
    for name, content in addition.files.items():
        (folder / name).write_bytes(content)
    (folder / CARD_FILE).write_text(model_card(plan, spec, settings, addition), encoding="utf-8")


def fill_folders(
    plan: Plan,
    specs: Sequence[MergeSpec],
    folders: Sequence[Path],
    *,
    max_shard_size: int,
    allow_nonfinite: bool = False,
    progress: Progress = SILENT,
) -> None:
    """Write all that is loaded from each output: weights, settings, tokenizer.

    Raises:
        UserError: a tensor of the inputs or of a result is not finite.
    """
    if isinstance(plan, AdapterPlan):
        writer = AdapterWriter(plan, specs, progress)
        writer.write(folders)
        if not allow_nonfinite:
            writer.nonfinite.refuse()
    else:
        write_weights(
            plan, specs, folders, max_shard_size=max_shard_size, allow_nonfinite=allow_nonfinite, progress=progress
        )
    for folder, spec in zip(folders, specs, strict=True):
        if isinstance(plan, AdapterPlan):
            write_adapter_companions(plan, spec, folder)
        else:
            write_companions(plan, folder)


def write_weights(
    plan: MergePlan,
    specs: Sequence[MergeSpec],
    folders: Sequence[Path],
    *,
    max_shard_size: int,
    allow_nonfinite: bool = False,
    progress: Progress = SILENT,
) -> None:
    """Stream every block of every tensor through all specs into their folders' weight files.

    Blocks are read and hashed in the order of the files, by threads that take turns, and merged side by side.

    Raises:
        UserError: a tensor of the inputs or of a result is not finite.
    """
    nonfinite, hashes = plan.nonfinite(), RunningHashes(plan.stored())
    tensors = plan.base.tensors
    with ExitStack() as stack:
        writers = [stack.enter_context(CheckpointWriter(folder, plan.outputs(), max_shard_size)) for folder in folders]
        order = writers[0].order
        total = total_bytes(tensors[name] for name in order)
        steps = {name: [plan.step(name, spec) for spec in specs] for name in order}

        progress.expect(total)
        progress.start("merging blocks", counted=True)
        queue = list(all_blocks(order, tensors))
        relay = Relay(queue)

        def worker() -> Callable[[object], None]:
            workspace = plan.workspace()

            def work(_: object) -> None:
                name, start, count = relay.take(
                    lambda block: workspace.load(*block), lambda: hashes.take(workspace.stored())
                )
                bad = []
                for writer, (values, wrong) in zip(writers, workspace.merge(steps[name]), strict=True):
                    writer.write(name, start, values)
                    bad.append(wrong)
                nonfinite.look(workspace, name, steps[name], bad)
                progress.advance(count * tensors[name].dtype.itemsize)

            return work

        # Each item lets whoever is free take the next block.
        share_out(queue, worker)
    hashes.remember()
    if not allow_nonfinite:
        nonfinite.refuse()


def write_adapter_companions(plan: AdapterPlan, spec: MergeSpec, folder: Path) -> None:
    """Write the settings of an adapter, and the tokenizer where a policy has one beside it."""
    sources = [adapter.folder for adapter in plan.adapters if any(adapter.folder.glob("tokenizer*"))]
    for source in sources[:1]:
        _copy_companions(source, folder)
    write_json(folder / ADAPTER_CONFIG, adapter_config(plan, spec))


def write_companions(plan: MergePlan, folder: Path) -> None:
    """Write config, tokenizer and whatever else of the base's folder belongs to a checkpoint."""
    _copy_companions(plan.base.folder, folder)
    config: dict[str, Any] = dict(plan.base.config)
    # Whoever loads with the type that the config names must get every bit that was written.
    config.pop("torch_dtype", None)
    config["dtype"] = plan.widest_dtype()
    write_json(folder / "config.json", config)


def _copy_companions(source: Path, folder: Path) -> None:
    for path in companions(source):
        shutil.copyfile(path, folder / path.name)


def check_space(needed: int, folder: Path) -> None:
    """Refuse to begin what the disk cannot hold.

    Raises:
        UserError: naming the bytes needed and free.
    """
    if needed > shutil.disk_usage(folder).free:
        raise _full(needed, folder.parent)


@contextmanager
def _explained(needed: int, target: Path) -> Iterator[None]:
    """Turn a disk that fills up meanwhile, or a limit on files, into one message."""
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
    """Return the command that runs, its own path cut to the name; a token in it, for `--score` say, is masked."""
    return [Path(sys.argv[0]).name, *map(masked, sys.argv[1:])]

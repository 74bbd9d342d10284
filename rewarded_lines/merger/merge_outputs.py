"""The output folders of a merge: each complete, or none; and what is told of them."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rewarded_lines.checkpoints.reader import total_bytes
from rewarded_lines.checkpoints.writer import parse_size
from rewarded_lines.errors import Problem, UserError, fail, masked
from rewarded_lines.folders import atomic_folder, existing_output, write_json
from rewarded_lines.merger.input_cards import CARD_FILE
from rewarded_lines.merger.merge_options import MergeOptions
from rewarded_lines.merger.model_card import CardAddition, model_card
from rewarded_lines.merger.plan import Kept, Plan
from rewarded_lines.merger.preferences import read_mixtures
from rewarded_lines.merger.record import RECORD_FILE, describe, hash_inputs
from rewarded_lines.merger.spec import MergeSpec

Addition = Callable[[MergeSpec], CardAddition] | None
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class MergeResult:
    """One merged policy: its folder (None after a dry run), the merge that made it, and μ by reward if it is known."""

    out: Path | None
    spec: MergeSpec
    names: Sequence[str]
    tensors: int
    bytes: int
    scales: Mapping[str, Sequence[float]]
    notes: Sequence[str] = ()
    preference: Mapping[str, float] = field(default_factory=dict)
    kept: Kept | None = None


def check_targets(targets: Sequence[Path], inputs: Sequence[str], overwrite: bool) -> None:
    """Refuse outputs that exist, or that lie in, on or around an input."""
    problems = [problem for target in targets for problem in existing_output(target, overwrite, RECORD_FILE)]
    problems += [
        Problem("two outputs would have the same name", str(target), remedy="name λ that differ in six digits")
        for target in dict.fromkeys(target for target in targets if targets.count(target) > 1)
    ]
    read = [Path(reference).resolve() for reference in inputs if Path(reference).exists()]
    for target in targets:
        # Path.resolve would raise on links that form a circle.
        place = Path(os.path.realpath(target))
        touched = [path for path in read if path == place or place in path.parents or path in place.parents]
        problems += [
            Problem("the output lies in, on or around an input", where=str(target), got=str(path)) for path in touched
        ]
    if problems:
        raise UserError(problems)


def write_outputs(
    plan: Plan, specs: Sequence[MergeSpec], targets: Sequence[Path], how: MergeOptions, addition: Addition
) -> list[MergeResult]:
    """Write one complete folder for each spec, or none; inputs are read once for all."""
    how.progress.start("measuring residuals")
    plan.prepare(specs)
    needed = sum(total_bytes(plan.outputs(spec)) for spec in specs)
    try:
        with ExitStack() as stack:
            folders = [stack.enter_context(atomic_folder(target, how.overwrite)) for target in targets]
            if needed > shutil.disk_usage(folders[0]).free:
                raise _full(needed, folders[0].parent)
            _fill(plan, specs, folders, how, addition)
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise _full(needed, targets[0].parent) from error
    return [result_of(plan, spec, target, how) for spec, target in zip(specs, targets, strict=True)]


def _fill(
    plan: Plan, specs: Sequence[MergeSpec], folders: Sequence[Path], how: MergeOptions, addition: Addition
) -> None:
    """Write weights, settings, `merge.json` and the model card of every output."""
    nonfinite = plan.write(specs, folders, parse_size(how.max_shard_size), how.progress)
    if not how.allow_nonfinite:
        nonfinite.refuse()
    how.progress.start("hashing inputs")
    inputs = hash_inputs(plan)
    settings = {
        **{"as": plan.kind, "dtype": how.dtype, "max_shard_size": how.max_shard_size},
        **{"layers": how.layers, "tower": how.tower},
        **({} if how.rank is None else {"rank": how.rank}),
        **{"tokenizer": plan.carried.tokenizer, "config_from": plan.carried.config_from},
        "chosen": dict(plan.carried.asked),
        # `--score` may contain an access token.
        "command": [Path(sys.argv[0]).name, *map(masked, sys.argv[1:])],
    }
    for folder, spec in zip(folders, specs, strict=True):
        own = {**settings, **_told_preference(how, plan, spec)}
        write_json(folder / RECORD_FILE, describe(plan, spec, inputs, own))
        added = addition(spec) if addition else CardAddition()
        for name, content in added.files.items():
            (folder / name).write_bytes(content)
        (folder / CARD_FILE).write_text(model_card(plan, spec, own, added), encoding="utf-8")
    how.progress.start("syncing to disk")


def _full(needed: int, place: Path) -> UserError:
    free = shutil.disk_usage(place).free
    return fail(
        "not enough disk space, or a limit on the size of files",
        where=str(place),
        expected=f"{needed:,} bytes ({needed / 1e9:.2f} GB) free",
        got=f"{free:,} bytes ({free / 1e9:.2f} GB)",
        remedy="choose another --out, fewer λ, or --dtype bfloat16",
    )


def result_of(plan: Plan, spec: MergeSpec, out: Path | None, how: MergeOptions) -> MergeResult:
    """Return what is told of one output."""
    outputs, kept, size = plan.outputs(spec), plan.kept(spec), total_bytes(plan.outputs(spec))
    names, notes = tuple(plan.policies), (*plan.notes, *([kept.sentence()] if kept else []))
    preference = _told_preference(how, plan, spec).get("preference", {})
    return MergeResult(out, spec, names, len(outputs), size, plan.scales(spec), notes, preference, kept)


def _told_preference(how: MergeOptions, plan: Plan, spec: MergeSpec) -> dict[str, Any]:
    """Return what is told of μ beside the weights, if the mixtures are known."""
    if not how.mixtures:
        return {}
    return {"mixtures": how.mixtures, "preference": read_mixtures(how.mixtures, plan.policies).preference(spec.weights)}

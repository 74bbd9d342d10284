"""Open and check the subject of `inspect`: a model, with or without its base, or an adapter with its base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rewarded_lines.checkpoints.adapters import Adapter, is_adapter
from rewarded_lines.checkpoints.headers import TensorInfo
from rewarded_lines.checkpoints.reader import Checkpoint, open_checkpoint, resolve_folder
from rewarded_lines.errors import Problem, UserError, fail, printable
from rewarded_lines.kernels.blocks import Source
from rewarded_lines.merger.adapter_checks import check_adapters, notes_on
from rewarded_lines.merger.lora_folding import FoldedAdapter
from rewarded_lines.merger.model_checks import check
from rewarded_lines.merger.open_inputs import collected

_LONGEST = 200


@dataclass(frozen=True)
class Subject:
    """A complete checkpoint that fits its base.

    Attributes:
        folder: of the checkpoint.
        config: the model's config.json.
        tensors: the tensors that a merge would take; for an adapter its base's.
        source: reads their values or residuals.
        base: the SFT model, if given.
        notes: on tensors that a merge would leave out.
    """

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    source: Source
    base: Checkpoint | None
    notes: list[str]


def open_subject(checkpoint: str, base: str | None) -> Subject:
    """Open a model or an adapter and, if given, its base; refuse a pair that cannot be merged."""
    opened: Checkpoint | Adapter | None = None
    origin: Checkpoint | None = None
    problems: list[Problem] = []
    with collected(problems):
        folder = resolve_folder(checkpoint)
        opened = Adapter(folder, checkpoint) if is_adapter(folder) else Checkpoint(folder, checkpoint)
    with collected(problems):
        origin = None if base is None else open_checkpoint(base)
    if opened is None or problems:
        raise UserError(problems)
    if isinstance(opened, Adapter):
        return _adapted(opened, origin, base)
    fitting = check(origin, {opened.folder.name: opened}) if origin else check(opened, {})
    tensors = {name: opened.tensors[name] for name in fitting.names}
    return Subject(opened.folder, opened.config, tensors, opened, origin, fitting.notes)


def _adapted(adapter: Adapter, base: Checkpoint | None, reference: str | None) -> Subject:
    if base is None or reference is None:
        named = printable(adapter.config.base[:_LONGEST]) or "with the model it was trained from"
        what, remedy = "an adapter is inspected over its base", f"pass --base {named}"
        raise fail(what, where=adapter.name, got="no --base", remedy=remedy)
    adapters = {adapter.folder.name: adapter}
    if problems := check_adapters(base, reference, adapters, folded=True):
        raise UserError(problems)
    fitting = check(base, {})
    tensors = {name: base.tensors[name] for name in fitting.names}
    count = f"{len(adapter.modules)} matrices of low rank, {len(adapter.saved)} tensors whole"
    notes = [f"an adapter: {count}; the rest is the base's", *fitting.notes, *notes_on(base, adapters)]
    return Subject(adapter.folder, base.config, tensors, FoldedAdapter(adapter, base.config), base, notes)

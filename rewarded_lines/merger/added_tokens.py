"""Vocabularies that were enlarged before training: PEFT saves the enlarged embeddings beside the adapters."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from rewarded_lines.checkpoints.adapters import Adapter
from rewarded_lines.checkpoints.block_counts import of_text
from rewarded_lines.checkpoints.dtypes import as_float64
from rewarded_lines.checkpoints.headers import TensorInfo
from rewarded_lines.checkpoints.reader import Checkpoint
from rewarded_lines.kernels.blocks import blocks_of
from rewarded_lines.merger.lora_folding import Base
from rewarded_lines.merger.tied_layers import same_values, stored_name


def enlarge(base: Base, adapters: Mapping[str, Adapter]) -> list[str]:
    """Give the base the rows for added tokens that all adapters have alike; return a note.

    Rows that differ from one adapter to another have no start in common, so those are left for the checks to refuse.
    """
    found = list(adapters.values())
    shared = {name: info for name, info in found[0].copies.items() if _added(base, name, info)} if found else {}
    if not shared or not all(_alike(found[0], other, name) for other in found[1:] for name in shared):
        return []
    if not all(_starts_as(base, _name(base, name), found[0], info) for name, info in shared.items()):
        return []
    base.borrow(found[0], {_name(base, name): info for name, info in shared.items()})
    rows = next(iter(shared.values())).shape[0]
    before, text = of_text(base.config, "vocab_size"), base.config.get("text_config")
    if isinstance(text, Mapping) and "vocab_size" in text:
        base.config = {**base.config, "text_config": {**text, "vocab_size": rows}}
    else:
        base.config = {**base.config, "vocab_size": rows}
    for adapter in found:
        adapter.before, adapter.enlarged = int(before), {name: adapter.copies.pop(name) for name in shared}
    return [f"the vocabulary grows from {before} to {rows} tokens: all policies have the same rows for the added ones"]


def _added(base: Base, name: str, info: TensorInfo) -> bool:
    """True if an adapter's copy of the base's embeddings or head has more rows than the base."""
    rows, stored = of_text(base.config, "vocab_size"), _name(base, name)
    if stored in base.tensors:
        rows = base.tensors[stored].shape[0]
        if base.tensors[stored].shape[1:] != info.shape[1:]:
            return False
    return len(info.shape) == 2 and isinstance(rows, int) and info.shape[0] > rows


def _starts_as(base: Base, name: str, adapter: Adapter, info: TensorInfo) -> bool:
    """True if an adapter's copy begins with the base's own rows."""
    stored = base.tensors.get(name)
    if stored is None:
        return True
    pairs = (
        (as_float64(base.read(name, *block)), as_float64(adapter.read(info.name, *block)))
        for block in blocks_of(stored.elements)
    )
    return all(np.array_equal(*pair) for pair in pairs)


def _name(base: Base, name: str) -> str:
    return (stored_name(base, name) if isinstance(base, Checkpoint) else None) or name


def _alike(first: Adapter, other: Adapter, name: str) -> bool:
    return name in other.copies and same_values(first, first.copies[name], other, other.copies[name])

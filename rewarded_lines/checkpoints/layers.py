"""Tensor name → depth: which block of the model a tensor belongs to, by anchored patterns, never by a guess."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rewarded_lines.errors import fail

# The block lists of the causal-LM families, anchored at the start of the name: `experts.0` inside block 3 is block 3.
BLOCK_LISTS: tuple[str, ...] = (
    r"model\.layers\.(\d+)\.",  # Llama, Mistral, Qwen2/3, Gemma, Phi, Mixtral, Qwen-MoE
    r"transformer\.h\.(\d+)\.",  # GPT-2, Falcon
    r"gpt_neox\.layers\.(\d+)\.",  # GPT-NeoX, Pythia
    r"model\.decoder\.layers\.(\d+)\.",  # OPT
)
_COUNT_KEYS = ("num_hidden_layers", "n_layer", "num_layers")


@dataclass(frozen=True)
class Depths:
    """The block index of every tensor, 0-based, None outside the blocks, and the number of blocks L."""

    block: Mapping[str, int | None]
    blocks: int


def find_depths(names: Iterable[str], config: Mapping[str, Any], pattern: str | None = None) -> Depths:
    """Return the depth of every tensor of a model.

    Args:
        names: the checkpoint's tensor names.
        config: its config.json; the number of blocks it declares must be the number found.
        pattern: a regular expression, matched from the start of the name, whose first group is the block index;
            for layouts that are not known here.

    Raises:
        UserError: no pattern fits, the user's pattern is not one, or the count disagrees with the config.
    """
    names = list(names)
    for candidate in (pattern,) if pattern else BLOCK_LISTS:
        matcher = _compile(candidate)
        found = {name: matcher.match(name) for name in names}
        if any(found.values()):
            block = {name: int(match[1]) if match else None for name, match in found.items()}
            return Depths(block, _count(block, config, candidate))
    shown = ", ".join(names[:3])
    raise fail(
        f"`--layers {pattern}` matches no tensor" if pattern else "the model's layout is not known",
        where=str(config.get("model_type", "model")),
        expected="names such as model.layers.0.mlp.up_proj.weight",
        got=shown + (", ..." if len(names) > 3 else ""),
        remedy=r"pass --layers with the block list's pattern, e.g. --layers 'decoder\.blocks\.(\d+)\.'",
    )


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise fail("not a regular expression", where="--layers", got=f"{pattern!r}: {error}") from error
    if compiled.groups < 1:
        raise fail("the pattern has no group", where="--layers", expected=r"(\d+) for the index", got=pattern)
    return compiled


def _count(block: Mapping[str, int | None], config: Mapping[str, Any], pattern: str) -> int:
    found = sorted({index for index in block.values() if index is not None})
    declared = next((config[key] for key in _COUNT_KEYS if isinstance(config.get(key), int)), len(found))
    if found != list(range(declared)):
        raise fail(
            f"the config declares {declared} blocks, the tensors show others",
            where=pattern,
            expected=f"blocks 0 to {declared - 1}",
            got=f"{len(found)} blocks, {found[0]} to {found[-1]}",
            remedy="the checkpoint is not whole, or --layers has another pattern to name",
        )
    return int(declared)

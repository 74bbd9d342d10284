"""Tensor name → depth: the block that a tensor belongs to, from a declared table, never guessed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any, Literal

from rewarded_lines.checkpoints.families import BLOCK_LISTS, TIED_HEADS, TOKEN_EMBEDDINGS, BlockList
from rewarded_lines.errors import Problem, UserError, fail

Side = Literal["before", "in", "after", "unknown"]

# Keys of the number of blocks in the config, for a list that the user's pattern describes.
_COUNTS_OF_A_PATTERN = ("num_hidden_layers", "n_layer", "num_layers")
# Bounded and ASCII: `\d` matches the digits of every script, `int` accepts any length.
_INDEX = re.compile("[0-9]{1,6}")
_MOST_BLOCKS = 10**6
_LISTED = re.compile(rf"({'|'.join(re.escape(blocks.path) for blocks in BLOCK_LISTS)})\.([^.]*)")


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in the model."""

    stack: str
    """Its block list, e.g. `model.layers` or `encoder.block`; outside the blocks the nearest list."""
    block: int | None
    """The 0-based index of its block, None outside the blocks."""
    blocks: int
    """The number of blocks L of that list."""
    side: Side
    """before: runs before the first block; after: final norm, pooler, heads; unknown: not in the table."""


@dataclass(frozen=True)
class Depths:
    """The place of every tensor, and the length of each block list, in the order in which they run."""

    place: Mapping[str, Place]
    stacks: Mapping[str, int]


def find_depths(names: Iterable[str], config: Mapping[str, Any], pattern: str | None = None) -> Depths:
    """Return the place of every tensor of a model; each block list has a depth of its own.

    Args:
        names: the checkpoint's tensor names.
        config: its config.json; it must declare the number of blocks found.
        pattern: for layouts that are not known here: a regular expression, matched from the start of the name, whose
            first group is the block index. The model then has one block list, named by the pattern, and the side of
            the tensors outside it is unknown.

    Raises:
        UserError: no list matches, the pattern is wrong, an index is not a number, or a count disagrees with the
            config.
    """
    names = list(names)
    lists = BLOCK_LISTS if pattern is None else (BlockList(pattern, _COUNTS_OF_A_PATTERN),)
    inside = _listed(names) if pattern is None else _matched(names, pattern)
    if not inside:
        raise _unknown_layout(names, config, pattern)
    indices: dict[str, set[int]] = {}
    for path, index in inside.values():
        indices.setdefault(path, set()).add(index)
    found = {blocks: len(indices[blocks.path]) for blocks in lists if blocks.path in indices}
    problems = [problem for blocks in found for problem in _miscounted(blocks, indices[blocks.path], config)]
    if problems:
        raise UserError(problems)
    stacks = {blocks.path: count for blocks, count in found.items()}
    places = {name: Place(path, index, stacks[path], "in") for name, (path, index) in inside.items()}
    tied = not any(name.removesuffix(".weight").rpartition(".")[2] in TOKEN_EMBEDDINGS for name in names)
    return Depths({name: places.get(name) or _outside(name, found, tied) for name in names}, stacks)


def with_declared_blocks(names: Iterable[str], config: Mapping[str, Any]) -> list[str]:
    """Return the names with stand-ins for the blocks that the config declares and for the embeddings.

    Adapters may leave out some of them, but a depth counts all blocks.
    """
    found = list(names)
    inside = {path for path, _ in _listed(found).values()}
    for blocks in BLOCK_LISTS:
        _, declared = _declared(blocks.counts, config) if blocks.path in inside else ("", None)
        if isinstance(declared, int) and 0 < declared < _MOST_BLOCKS:
            found += [f"{blocks.path}.{index}.declared" for index in range(declared)]
    return [*found, f"{TOKEN_EMBEDDINGS[0]}.declared.{TOKEN_EMBEDDINGS[0]}"]


def _listed(names: Sequence[str]) -> dict[str, tuple[str, int]]:
    """Return list and index of the tensors in the lists of the table."""
    found = ((name, _LISTED.match(name)) for name in names)
    return {name: (match[1], _index(name, match[2])) for name, match in found if match}


def _matched(names: Sequence[str], pattern: str) -> dict[str, tuple[str, int]]:
    """Return list (the pattern itself) and index of the tensors that match the user's pattern."""
    try:
        compiled = re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise fail("not a regular expression", where="--layers", got=f"{pattern!r}: {error}") from error
    if compiled.groups < 1:
        raise fail("the pattern has no group", where="--layers", expected=r"(\d+) for the index", got=pattern)
    found = ((name, compiled.match(name)) for name in names)
    return {name: (pattern, _index(name, match[1])) for name, match in found if match and match[1] is not None}


def _index(name: str, text: str) -> int:
    if not _INDEX.fullmatch(text):
        raise fail(
            "the number of the block is not a number",
            where=_shown(name),
            expected="up to six digits",
            got=_shown(text),
            remedy="copy the checkpoint again, or correct the pattern of --layers",
        )
    return int(text)


def _miscounted(blocks: BlockList, found: set[int], config: Mapping[str, Any]) -> list[Problem]:
    """Return the problem of the indices of one list if they are not 0 to L-1, L as the config declares."""
    key, declared = _declared(blocks.counts, config)
    if declared is None:
        declared = len(found)
    if isinstance(declared, bool) or not isinstance(declared, int) or declared < 1:
        what = "the config's number of blocks is not a positive whole number"
        return [Problem(what, where=blocks.path, expected=f"{key}: {len(found)}", got=f"{key}: {_shown(declared)}")]
    # Not list(range(declared)): the config may declare any number.
    if len(found) == declared and max(found) == declared - 1:
        return []
    return [
        Problem(
            f"the config declares {declared} blocks, the tensors show others" if key else "blocks are missing",
            where=blocks.path,
            expected=f"blocks 0 to {declared - 1}",
            got=f"{len(found)} blocks, {min(found)} to {max(found)}",
            remedy="copy the checkpoint again, or correct the pattern of --layers",
        )
    ]


def _declared(keys: Sequence[str], config: Mapping[str, Any]) -> tuple[str, Any]:
    """Return the first of the dotted keys that the config has, with its value; otherwise "" and None."""
    for key in keys:
        value: Any = config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is not None:
            return key, value
    return "", None


def _outside(name: str, found: dict[BlockList, int], tied: bool) -> Place:
    """Return the place of a tensor outside the blocks; heads belong to the last list."""
    for blocks, count in found.items():
        if _is_of(name, blocks.before):
            return Place(blocks.path, None, count, "before")
    for blocks, count in reversed(found.items()):
        if _is_of(name, blocks.after):
            return Place(blocks.path, None, count, "before" if tied and name in TIED_HEADS else "after")
    parts = name.split(".")
    nearest = max(found, key=lambda blocks: len(commonprefix([parts, blocks.path.split(".")])))
    return Place(nearest.path, None, found[nearest], "unknown")


def _is_of(name: str, modules: Iterable[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _unknown_layout(names: Sequence[str], config: Mapping[str, Any], pattern: str | None) -> UserError:
    seen = [name for name in names if re.search(r"\.[0-9]+\.", name)] or names
    return fail(
        "the model's layout is not known" if pattern is None else f"`--layers {pattern}` matches no tensor",
        where=_shown(config.get("model_type", "model")),
        expected="names such as model.layers.0.mlp.up_proj.weight",
        got=", ".join(map(_shown, seen[:3])) + (", ..." if len(seen) > 3 else "") if names else "no tensors",
        remedy=r"pass --layers with the block list's pattern, e.g. --layers 'decoder\.blocks\.(\d+)\.'",
    )


def _shown(value: object) -> str:
    """Return a name or value from a file, short and printable, for an error."""
    text = value if isinstance(value, str) and value.isprintable() else repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."

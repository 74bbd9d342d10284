"""Tensor name → depth: the block that a tensor belongs to; a list of blocks that is not known is refused."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any, Literal, get_args

from rewarded_lines.checkpoints.block_counts import words_of
from rewarded_lines.checkpoints.families import (
    AFTER_BLOCKS,
    BEFORE_BLOCKS,
    BLOCK_LISTS,
    HEADS,
    TIED_HEADS,
    TOKEN_EMBEDDINGS,
    BlockList,
)
from rewarded_lines.checkpoints.numbered_lists import NumberedList, find_lists, shown
from rewarded_lines.errors import Problem, UserError, fail

Side = Literal["before", "in", "after", "unknown", "flat", "base"]
SIDES: tuple[Side, ...] = get_args(Side)

_ROWS = {blocks.path: blocks for blocks in BLOCK_LISTS}
_TOWER_RULES = ("base", "flat", "depth")
_SAID: Mapping[str, Side] = {"flat": "flat", "base": "base"}
# Towers and encoders run before the text or the decoder.
_EARLY = frozenset(("vision", "audio", "encoder"))


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
    """before: runs before the first block; after: final norm, pooler, heads; unknown: not in the table.

    By the user's word: flat: in blocks that all get α; base: in a tower that stays as the base has it.
    """


@dataclass(frozen=True)
class Depths:
    """The place of every tensor, and the length of each block list, in the order in which they run."""

    place: Mapping[str, Place]
    stacks: Mapping[str, int]


def find_depths(
    names: Iterable[str], config: Mapping[str, Any], pattern: str | None = None, towers: str | None = None
) -> Depths:
    """Return the place of every tensor of a model; each block list has a depth of its own.

    Args:
        names: the checkpoint's tensor names.
        config: its config.json; the numbers of blocks that it declares must be those found.
        pattern: for layouts that are not known here: a regular expression, matched from the start of the name, whose
            first group is the block index. The names before the index are the lists' names.
        towers: what becomes of other lists, e.g. `vision=flat,audio=base`; see `_towers`.

    Raises:
        UserError: no list is known, a list may be one of blocks or not, the pattern is wrong, an index is not a
            number, or a count disagrees with the config.
    """
    names = list(names)
    lists = find_lists(names, config, pattern)
    if not lists or (pattern is not None and not any(one.by == "user" for one in lists)):
        raise _unknown_layout(names, config, pattern)
    rules = _tower_rules(towers, lists)
    for one in lists:
        if one.verdict == "unsure" and _rule(one.path, rules) == "depth":
            one.by, one.longest = "user", False
    scheduled = [one for one in lists if _rule(one.path, rules) in ("", "depth")]
    unsure = [one for one in scheduled if one.verdict == "unsure"]
    scheduled = [one for one in scheduled if one.verdict == "blocks"]
    problems = [problem for one in scheduled if (problem := one.problem())]
    if problems or unsure:
        raise UserError([*problems, *_unsure(unsure, pattern)])
    if not scheduled:
        raise fail("no list of blocks is left", where=f"--tower {towers}", remedy="for α alone pass --beta 0")
    scheduled.sort(key=_rank)
    places = _Places(scheduled, rules, names)
    return Depths({name: places.of(name) for name in names}, places.stacks)


def with_declared_blocks(
    names: Iterable[str], config: Mapping[str, Any], pattern: str | None = None, towers: str | None = None
) -> list[str]:
    """Return an adapter's names with stand-ins for the blocks that the config declares and for the embeddings.

    Adapters may leave out some of them, but a depth counts all blocks; see `find_depths`.

    Raises:
        UserError: only the base's tensors can say how many blocks a list has.
    """
    found = list(names)
    lists = find_lists(found, config, pattern, partial=True)
    rules = _tower_rules(towers, lists)
    problems = []
    for one in lists:
        missing = range(0) if one.by == "user" or _rule(one.path, rules) in ("flat", "base") else one.missing
        if missing is None:
            what, expected = "the adapters alone do not show how many blocks the model has", "the base with its weights"
            got = f"{one.found} modules, {min(one.below)} to {max(one.below)}"
            problems.append(Problem(what, shown(one.path), expected, got, "pass --base with the full-precision model"))
        else:
            found += [f"{one.path}.{index}.declared.block" for index in missing]
    if problems:
        raise UserError(problems)
    return [*found, f"{TOKEN_EMBEDDINGS[0]}.declared.{TOKEN_EMBEDDINGS[0]}"]


class _Places:
    """Finds the place of one tensor after the other."""

    def __init__(self, lists: Sequence[NumberedList], rules: Mapping[str, str], names: Sequence[str]) -> None:
        self.stacks = {one.path: one.blocks for one in lists}
        self._rules = rules
        self._inside = {name: (one, index) for one in lists for name, index in one.index.items()}
        self._rows = [
            _ROWS.get(one.path) or BlockList(one.path, (), HEADS if one.by == "nobody" else ()) for one in lists
        ]
        self._generic = {one.path for one in lists if one.by == "nobody"}
        self._tied = not any(name.removesuffix(".weight").rpartition(".")[2] in TOKEN_EMBEDDINGS for name in names)

    def of(self, name: str) -> Place:
        """Return the place of a tensor."""
        if name in self._inside:
            one, index = self._inside[name]
            # Modules after the last block predict further tokens from its output.
            inner = index < one.blocks
            return Place(one.path, index if inner else None, one.blocks, "in" if inner else "after")
        nearest = self._nearest(name)
        if said := _SAID.get(_rule(name, self._rules)):
            return self._outside(nearest, said)
        for row in self._rows:
            if _is_of(name, row.before):
                return self._outside(row.path, "before")
        # Heads belong to the last list.
        for row in reversed(self._rows):
            if _is_of(name, row.after):
                return self._outside(row.path, "before" if self._tied and name in TIED_HEADS else "after")
        return self._outside(nearest, self._usual_side(name, nearest) if nearest in self._generic else "unknown")

    def _outside(self, path: str, side: Side) -> Place:
        return Place(path, None, self.stacks[path], side)

    def _nearest(self, name: str) -> str:
        parts = name.split(".")
        return max(self.stacks, key=lambda path: len(commonprefix([parts, path.split(".")])))

    def _usual_side(self, name: str, path: str) -> Side:
        """Return the side by the usual names of embeddings and norms, beside the list or beside a module around it."""
        parts = name.split(".")
        module = "".join(parts[len(commonprefix([parts, path.split(".")])) :][:1])
        if BEFORE_BLOCKS.fullmatch(module):
            return "before"
        return "after" if AFTER_BLOCKS.fullmatch(module) else "unknown"


def _rank(one: NumberedList) -> int:
    """Return a key that puts unknown towers and encoders first, and other unknown lists last."""
    if one.by != "nobody":
        return 0
    return -1 if words_of(one.path) & _EARLY else 1


def _tower_rules(towers: str | None, lists: Sequence[NumberedList]) -> dict[str, str]:
    """Return what becomes of parts of the model, each by the module that it lies in.

    `vision=flat` scales a part's tensors by α, `vision=base` keeps the base's, `vision=depth` gives its list of blocks
    a depth of its own. The part is named by a word, such as vision, audio or text, or by a module, such as
    `model.vision_tower`.
    """
    rules: dict[str, str] = {}
    for text in (towers or "").split(",") if towers else ():
        name, _, rule = text.strip().partition("=")
        roots = {root for one in lists if (root := _root(one.path, name))}
        if rule not in _TOWER_RULES or not roots:
            raise fail(
                "no list of blocks lies there" if rule in _TOWER_RULES else "not a rule for a tower",
                where=f"--tower {shown(text)}",
                expected=f"NAME=base, flat or depth; NAME a word or module of {', '.join(one.path for one in lists)}",
                got=shown(text),
            )
        rules |= dict.fromkeys(roots, rule)
    return rules


def _root(path: str, name: str) -> str:
    """Return the module of a list's path that a tower's name means, or ""."""
    if f"{path}.".startswith(f"{name}."):
        return name
    parts = [] if "." in name or not name else path.split(".")
    around = [end for end, part in enumerate(parts, start=1) if words_of(name) <= words_of(part)]
    return ".".join(parts[: around[0]]) if around else ""


def _rule(name: str, rules: Mapping[str, str]) -> str:
    """Return the rule of the innermost tower that a name lies in, or ""."""
    around = [root for root in rules if name == root or name.startswith(f"{root}.")]
    return rules[max(around, key=len)] if around else ""


def _is_of(name: str, modules: Iterable[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _unsure(lists: Sequence[NumberedList], pattern: str | None) -> list[Problem]:
    """Return a problem for each list that may be one of blocks or not, all with the options that settle it."""
    patterns = [*([pattern] if pattern else []), *(one.pattern for one in lists)]
    spelled = [one.by == "underscores" for one in lists]
    roots = [one.path.rpartition(".")[0] if joined else one.path for one, joined in zip(lists, spelled, strict=True)]
    remedy = f"pass --tower {','.join(f'{root}=flat' for root in dict.fromkeys(roots))}"
    # linear_0 and norm_0 stand side by side, so no pattern has whole blocks.
    if not any(spelled):
        remedy = (
            f"if these are blocks that run one after the other, pass --layers '{'|'.join(patterns)}'; if not, {remedy}"
        )
    return [
        Problem(
            "a list of numbered modules that may be blocks or not",
            where=shown(one.path),
            expected="a list that the config declares" + (f": {_declarations(one)}" if one.declared else ""),
            got=f"{one.found} modules, {min(one.below)} to {max(one.below)}",
            remedy=remedy,
        )
        for one in lists
    ]


def _declarations(one: NumberedList) -> str:
    return ", ".join(f"{entry.key}: {shown(entry.value)}" for entry in one.declared)


def _unknown_layout(names: Sequence[str], config: Mapping[str, Any], pattern: str | None) -> UserError:
    seen = [name for name in names if re.search(r"\.[0-9]+\.", name)] or names
    return fail(
        "the model's layout is not known" if pattern is None else f"`--layers {pattern}` matches no tensor",
        where=shown(config.get("model_type", "model")),
        expected="names such as model.layers.0.mlp.up_proj.weight",
        got=", ".join(map(shown, seen[:3])) + (", ..." if len(seen) > 3 else "") if names else "no tensors",
        remedy=r"pass --layers with the block list's pattern, e.g. --layers 'decoder\.blocks\.(\d+)\.'",
    )

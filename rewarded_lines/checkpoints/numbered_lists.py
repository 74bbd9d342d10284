"""Numbered modules in tensor names: which of them are a model's blocks, by their names and the config's numbers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

from rewarded_lines.checkpoints.block_counts import Declared, all_counts, declared_for, further_blocks, words_of
from rewarded_lines.checkpoints.families import BLOCK_LISTS, BLOCK_NAMES, OTHER_LISTS, SMALL_NETWORKS
from rewarded_lines.errors import Problem, fail

# Bounded and ASCII: `\d` matches the digits of every script, `int` accepts any length.
_INDEX = re.compile("[0-9]{1,6}")
_TABLE = [blocks.path for blocks in BLOCK_LISTS]
_LISTED = re.compile(rf"({'|'.join(map(re.escape, _TABLE))})\.([^.]*)")
_NUMBERED = re.compile(r"\.([0-9]{1,6})(?=\.)")
_UNDERSCORED = re.compile(r".*?\.[a-z]\w*?_([0-9]{1,6})(?=\.)")
_STAGED = re.compile(r"(?:(?:layers|blocks)\.)?#\.")
_FEW, _MOST = 2, 10**6
# Words in the path of any model's main list.
_PLAIN_WORDS = words_of(
    "base.model.transformer.backbone.text.vision.tower.encoder.decoder.bert.layers.layer.blocks.block.h"
)
_PARTS_OF_MODELS = frozenset(("vision", "audio", "text", "encoder", "decoder"))

By = Literal["user", "table", "nobody", "underscores"]
Verdict = Literal["blocks", "no blocks", "look inside", "unsure"]


@dataclass
class NumberedList:
    """The modules `path.0` to `path.{n-1}`.

    Attributes:
        path: the name before the number.
        by: who says that these are blocks: the user, the table of families, or nobody; of modules such as linear_0
            nobody can be sure.
        declared: the numbers of blocks that the config declares for this path.
        elsewhere: the numbers that it declares anywhere.
        further: how many modules may follow the last block, which only predict further tokens.
        index: the number of each tensor's module, by the tensor's name.
        below: the names below each module, with # for numbers.
        family: the words of the config's model_type.
        longest: no other list of this part of the model is longer.
        partial: some of its modules may not be among the tensors, as in an adapter.
    """

    path: str
    by: By
    declared: Sequence[Declared]
    elsewhere: frozenset[int] = frozenset()
    further: int = 0
    family: frozenset[str] = frozenset()
    index: dict[str, int] = field(default_factory=dict)
    below: dict[int, set[str]] = field(default_factory=dict)
    longest: bool = True
    partial: bool = False

    def add(self, name: str, index: int, below: str) -> None:
        """Add a tensor of the module with this number."""
        self.index[name] = index
        self.below.setdefault(index, set()).add(re.sub("[0-9]+", "#", below))

    @property
    def found(self) -> int:
        """Return the number of modules in the tensors' names."""
        return len(self.below)

    @property
    def counts(self) -> list[int]:
        """Return the declared numbers, without values that can be none."""
        return [one.value for one in self.declared if one.valid]

    @property
    def missing(self) -> range | None:
        """Return the blocks to add to an adapter's, or None if config and names do not say how many there are."""
        numbers = set(self.counts)
        if self.complete and (self.found in numbers or (self.by != "nobody" and not numbers)):
            return range(0)
        # In a list without a row the number may be that of another list, as the number of the text's blocks is for a
        # projector with blocks of its own.
        said = {word for one in self.declared for word in one.section | one.words}
        own = words_of(self.path) - said - self.family - _PLAIN_WORDS
        short = self.complete and self.found in self.elsewhere
        doubtful = self.by == "nobody" and (bool(own) or not self.longest or short)
        if len(numbers) != 1 or doubtful or not self.named_as_blocks:
            return None
        (declared,) = numbers
        # A number that is too small or absurd is refused later, as a whole model's would be.
        return range(declared if max(self.below) < declared < _MOST else 0)

    @property
    def blocks(self) -> int:
        """Return the number of blocks L."""
        fewer = self.found - self.further
        return fewer if fewer in self.counts and self.found not in self.counts else self.found

    @property
    def pattern(self) -> str:
        """Return the pattern for --layers that names this list."""
        return rf"{re.escape(self.path)}\.(\d+)\."

    @property
    def complete(self) -> bool:
        """Return whether the modules are numbered from 0 without a gap."""
        return max(self.below) == self.found - 1

    @property
    def part(self) -> tuple[object, ...]:
        """Return what the lists of one part of a model have in common, such as the vision tower's."""
        return (*(one.key for one in self.declared), words_of(self.path) & _PARTS_OF_MODELS)

    @property
    def named_as_blocks(self) -> bool:
        """Return whether the list has a usual name, such as layers."""
        return self.by != "nobody" or bool(BLOCK_NAMES.fullmatch(self.path.rpartition(".")[2]))

    @property
    def confirmed(self) -> bool:
        """Return whether the config declares this number of blocks, for a list of its own name or for any other."""
        specific = any((one.section | one.words) & words_of(self.path) for one in self.declared)
        anywhere = self.by == "user" or (self.by == "nobody" and self.named_as_blocks and not specific)
        return self.complete and self.blocks in (*self.counts, *(self.elsewhere if anywhere else ()))

    @property
    def verdict(self) -> Verdict:
        """Return whether these are blocks, by their names, the config, and the lengths of the lists beside."""
        if self.by == "underscores":
            return "unsure"
        if self.by != "nobody":
            return "blocks"
        # Blocks have modules of their own; the layers of a projector have none.
        simple = not any("." in rest for each in self.below.values() for rest in each)
        long = self.named_as_blocks and self.complete and self.found > _FEW
        if OTHER_LISTS.search(self.path) or (simple and (not long or SMALL_NETWORKS.search(self.path))):
            return "no blocks"
        if simple:
            return "blocks" if self.blocks in self.counts else "unsure"
        # Stages hold numbered blocks themselves, so no one number says how deep a block lies.
        if all(any(map(_STAGED.match, each)) for each in self.below.values()):
            return "look inside" if self.found == 1 else "unsure"
        if self.confirmed and (self.named_as_blocks or self.longest):
            return "blocks"
        if self.partial:
            return "blocks" if self.named_as_blocks else "unsure"
        if self.found == 1:
            return "look inside"
        # Blocks have a part in common, such as a norm. The steps of an audio codec have none, and there are gaps.
        alike = bool(set.intersection(*self.below.values()))
        if not (self.complete or alike):
            return "no blocks"
        return "blocks" if self.named_as_blocks and self.longest and alike else "unsure"

    def problem(self) -> Problem | None:
        """Return what is wrong with the numbers if they are not 0 to L-1, L as the config declares it."""
        if wrong := [one for one in self.declared if not one.valid and one.value is not None]:
            if self.blocks not in self.counts:
                what = "the config's number of blocks is not a positive whole number"
                expected, got = f"{wrong[0].key}: {self.found}", f"{wrong[0].key}: {shown(wrong[0].value)}"
                return Problem(what, where=shown(self.path), expected=expected, got=got)
        # The user may mean a list beside the main one, for which the config has no number.
        counts = [] if self.by == "user" and not self.longest else list(dict.fromkeys(self.counts))
        if self.confirmed or (self.complete and not counts):
            return None
        said = " or ".join(map(str, counts))
        remedy = "copy the checkpoint again, or correct the pattern of --layers"
        if self.complete and self.blocks in self.elsewhere:
            remedy = f"if the config's other number is meant, pass --layers '{self.pattern}'"
        return Problem(
            f"the config declares {said} blocks, the tensors show others" if counts else "blocks are missing",
            where=shown(self.path),
            expected=f"blocks 0 to {max(counts, default=max(self.below) + 1) - 1}",
            got=f"{self.found} blocks, {min(self.below)} to {max(self.below)}",
            remedy=remedy,
        )


def find_lists(
    names: Sequence[str], config: Mapping[str, Any], pattern: str | None = None, partial: bool = False
) -> list[NumberedList]:
    """Return the lists of blocks, and those of which it is not sure: the user's, the table's, and all others.

    Of lists inside each other the outermost counts. Only a single module is looked into, since it may hold a list of
    blocks. `partial` names may leave out blocks.
    """
    users = [] if pattern is None else _gather(_matched(names, pattern), config, "user")
    # What the user's pattern leaves out of its own lists is outside the blocks.
    own = tuple(f"{one.path}." for one in users)
    taken = {name for one in users for name in one.index}
    left = [name for name in names if name not in taken and not name.startswith(own)]
    known = _gather(_listed(left), config, "table")
    found = [*users, *sorted(known, key=lambda one: _TABLE.index(one.path))]
    taken = {name for one in known for name in one.index}
    left, depth = [name for name in left if name not in taken], 0
    spelled = _gather(_underscored(left), config, "underscores")
    found += [one for one in spelled if one.complete and one.found > _FEW and one.found in one.counts]
    while left:
        level = _gather(_numbered(left, depth), config, "nobody", partial)
        _compare_lengths([*found, *level], level)
        left, depth = [name for one in level if one.verdict == "look inside" for name in one.index], depth + 1
        found += [one for one in level if one.verdict in ("blocks", "unsure")]
    _compare_lengths(found, found)
    return found


def _gather(
    entries: Iterable[tuple[str, str, int, str]], config: Mapping[str, Any], by: By, partial: bool = False
) -> list[NumberedList]:
    """Return the lists of tensors, each given by its name, its list's path, its index and the name below."""
    lists: dict[str, NumberedList] = {}
    shared: dict[str, Any] = {"elsewhere": all_counts(config), "further": further_blocks(config), "partial": partial}
    shared["family"] = words_of(str(config.get("model_type", "")))
    for name, path, index, below in entries:
        if path not in lists:
            lists[path] = NumberedList(path, by, declared_for(path, config), **shared)
        lists[path].add(name, index, below)
    return list(lists.values())


def _compare_lengths(lists: Sequence[NumberedList], compared: Sequence[NumberedList]) -> None:
    """Set `longest`: a list is that of a part of the model if no other is longer or has the part's number of blocks."""
    longest: dict[tuple[object, ...], int] = {}
    for one in lists:
        longest[one.part] = max(one.found, longest.get(one.part, 0))
    taken = {entry.key for one in lists if one.confirmed for entry in one.declared if entry.value == one.blocks}
    for one in compared:
        others = not one.confirmed and any(entry.key in taken for entry in one.declared)
        one.longest = one.found == longest[one.part] and not others


def _listed(names: Iterable[str]) -> Iterator[tuple[str, str, int, str]]:
    """Yield the tensors in lists of the table."""
    for name in names:
        if match := _LISTED.match(name):
            yield name, match[1], _index(name, match[2]), name[match.end() + 1 :]


def _numbered(names: Iterable[str], depth: int) -> Iterator[tuple[str, str, int, str]]:
    """Yield the tensors in any numbered module, by the outermost number or, with a depth, by one inside."""
    for name in names:
        if number := next(islice(_NUMBERED.finditer(name), depth, None), None):
            yield name, name[: number.start()], int(number[1]), name[number.end() + 1 :]


def _underscored(names: Iterable[str]) -> Iterator[tuple[str, str, int, str]]:
    """Yield the tensors in modules such as linear_0, if no module around them is a number."""
    for name in names:
        if not _NUMBERED.search(name) and (match := _UNDERSCORED.match(name)):
            yield name, name[: match.start(1)], int(match[1]), name[match.end() + 1 :]


def _matched(names: Iterable[str], pattern: str) -> list[tuple[str, str, int, str]]:
    """Return the tensors that match the user's pattern, in one list or in one for each name before the number."""
    try:
        compiled = re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise fail("not a regular expression", where="--layers", got=f"{pattern!r}: {error}") from error
    if compiled.groups < 1:
        raise fail("the pattern has no group", where="--layers", expected=r"(\d+) for the index", got=pattern)
    entries, paths = [], dict[str, set[int]]()
    for name in names:
        match = compiled.match(name)
        if match and (group := next((i for i in range(1, compiled.groups + 1) if match[i] is not None), 0)):
            path, index = name[: match.start(group)].rstrip("."), _index(name, match[group])
            entries.append((name, path, index, name[match.end(group) :]))
            paths.setdefault(path, set()).add(index)
    # Blocks of two kinds may share one row of numbers: mamba.0, attention.1, mamba.2.
    if all(path and max(indices) == len(indices) - 1 for path, indices in paths.items()):
        return entries
    return [(name, pattern, index, below) for name, _, index, below in entries]


def _index(name: str, text: str) -> int:
    if not _INDEX.fullmatch(text):
        raise fail(
            "the number of the block is not a number",
            where=shown(name),
            expected="up to six digits",
            got=shown(text),
            remedy="copy the checkpoint again, or correct the pattern of --layers",
        )
    return int(text)


def shown(value: object) -> str:
    """Return a name or value from a file, short and printable, for an error."""
    text = value if isinstance(value, str) and value.isprintable() else repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."

"""Which tensor of the base a name means: trainers, compilers and versions of transformers name one tensor differently.

Names are compared by their keys: without the modules that wrap others, and with one word for each thing that has
several. A name is resolved only if exactly one other has its key, so a wrong word can leave names unresolved, and those
are refused, but cannot mix tensors up.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from os.path import commonprefix
from typing import Any

from rewarded_lines.checkpoints.block_counts import of_text
from rewarded_lines.checkpoints.conversions import (
    FUSIONS,
    LEFT_OVER,
    PREDICTS_FURTHER,
    ROOTS,
    SHIFTS,
    SYNONYMS,
    TOWERS,
    TRANSPOSED,
    WRAPPERS,
)
from rewarded_lines.checkpoints.families import HEADS
from rewarded_lines.checkpoints.headers import TensorInfo

Tensors = Mapping[str, TensorInfo]
Key = Callable[[str], str]

_FURTHER = re.compile(r"mtp(_\w+)?\.")
_LEFT_OVER = re.compile("|".join(LEFT_OVER))
_BLOCK = re.compile(r"layers\.([0-9]{1,6})\.(.*)")
_SHARED = re.compile(r"self_attn\.[kv]_(proj|norm)\.")
_COMPILERS = frozenset(name for name in WRAPPERS if name.startswith("_"))


def _dotted(modules: str) -> str:
    """Return modules with the dots around them, "^." before them at the start of a name."""
    return f"^.{modules[1:]}." if modules.startswith("^") else f".{modules}." if modules else "."


_RULES = tuple((_dotted(old), _dotted(f"^{new}" if old.startswith("^") else new)) for old, new in SYNONYMS)


def without_compilers(name: str) -> str:
    """Return a name without the modules that compilers and FSDP put around others."""
    return _without(name, _COMPILERS)


def under_names_of(base: Tensors, tensors: Tensors) -> dict[str, TensorInfo]:
    """Return tensors under the base's names; those that mean none of the base's keep their own.

    Values stay where they are: a tensor that is a part of another is a view into it, one that joins several has them as
    its pieces.
    """
    found = {name: info for name, info in tensors.items() if name in base}
    rest = {name: info for name, info in tensors.items() if name not in base}
    wanted = {name: info for name, info in base.items() if name not in tensors}
    if not rest or not wanted:
        return dict(tensors)
    renamed, left = dict[str, TensorInfo](), rest
    for key in _keys(wanted, rest):
        attempt = _resolved(wanted, rest, key)
        if len(attempt[1]) < len(left):
            renamed, left = attempt
        if not left:
            break
    return found | renamed | left


def in_shapes_of(base: Tensors, tensors: Tensors, config: Mapping[str, Any]) -> dict[str, TensorInfo]:
    """Return tensors with the base's shapes where a version of transformers exchanged two axes, see `TRANSPOSED`."""
    if config.get("model_type") not in TRANSPOSED:
        return dict(tensors)
    found = dict(tensors)
    for name, info in tensors.items():
        *outer, rows, columns = base[name].shape if name in base and len(base[name].shape) == 3 else (0, 0)
        if ".experts." in name and rows != columns and info.shape == (*outer, columns, rows) and not info.pieces:
            found[name] = replace(info, shape=base[name].shape, transposed=True)
    return found


def names_in(base: Collection[str], names: Iterable[str]) -> dict[str, str]:
    """Return for each name the one of the base that means the same; names without one are left out."""
    names = list(names)
    rest = [name for name in names if name not in base]
    best: dict[str, str] = {}
    for key in _keys(base, rest) if rest else ():
        theirs, mine = _unique(key, base), _unique(key, rest)
        attempt = {name: theirs[found] for found, name in mine.items() if found in theirs}
        best = max(best, attempt, key=len)
        if len(best) == len(rest):
            break
    return {name: name for name in names if name in base} | best


def same_modules(lists: Iterable[Iterable[str]]) -> list[dict[str, str]]:
    """Return for the modules of several models, list by list, one name for each that means the same: the first."""
    first: dict[str, str] = {}
    found = []
    for names in map(list, lists):
        keys = _unique(partial(_key, roots=ROOTS), names)
        found.append({name: first.setdefault(key, name) for key, name in keys.items()})
    return found


def never_loaded(names: Iterable[str], config: Mapping[str, Any]) -> set[str]:
    """Return the tensors that transformers has in no model: what predicts further tokens, and some leftovers.

    The later blocks of Gemma 3n and 4 take keys and values from earlier ones, so their own are not loaded either.
    """
    names = list(names)
    blocks, shared = _count(config, "num_hidden_layers"), _count(config, "num_kv_shared_layers")
    found = predicts_further(names, config)
    for name in names:
        short = _without(name, WRAPPERS)
        match = _BLOCK.match(short)
        unused = shared and match and int(match[1]) >= blocks - shared and _SHARED.match(match[2])
        if unused or _LEFT_OVER.match(short):
            found.add(name)
    return found


def predicts_further(names: Iterable[str], config: Mapping[str, Any]) -> set[str]:
    """Return the tensors of blocks that predict further tokens than the next; transformers loads them in no model."""
    blocks, further = _count(config, "num_hidden_layers"), _count(config, "num_nextn_predict_layers")
    short = {name: _without(name, WRAPPERS) for name in names}
    inside = {name: match for name, plain in short.items() if (match := _BLOCK.match(plain))}
    predicting = {int(match[1]) for match in inside.values() if match[2].startswith(PREDICTS_FURTHER)}
    beyond = {
        name
        for name, match in inside.items()
        if 0 < blocks <= int(match[1]) and (int(match[1]) < blocks + further or int(match[1]) in predicting)
    }
    return beyond | {name for name, plain in short.items() if _FURTHER.match(plain)}


def of_towers(names: Iterable[str]) -> set[str]:
    """Return the tensors of towers that see or hear, and of what joins them to the text model."""
    return {name for name in names if _without(name, WRAPPERS).startswith(TOWERS)}


def _count(config: Mapping[str, Any], key: str) -> int:
    """Return a number of blocks of the text model, 0 if the config has none."""
    value = of_text(config, key)
    return value if isinstance(value, int) else 0


def _keys(first: Iterable[str], second: Iterable[str]) -> Iterator[Key]:
    """Yield ways of making keys: without known wrappers, then without what all names of a side begin with (`bert.`)."""
    yield partial(_key, roots=ROOTS)
    for names in (first, second):
        # Heads lie beside a base model, so they do not have its prefix.
        modules = [name.split(".")[:-1] for name in names if not name.startswith(HEADS)]
        yield partial(_key, roots=ROOTS.union(commonprefix(modules)))


def _key(name: str, roots: Collection[str]) -> str:
    """Return the name without wrappers, and with one word for each thing; `roots` are dropped at the start only."""
    parts = _without(name, WRAPPERS).split(".")
    while len(parts) > 1 and parts[0] in roots:
        parts = parts[1:]
    return _replaced(".".join(parts), _RULES)


def _replaced(name: str, rules: Iterable[tuple[str, str]]) -> str:
    text = f"^.{name}."
    for old, new in rules:
        if old in text:
            text = text.replace(old, new)
    return text[2:-1]


def _without(name: str, modules: Collection[str]) -> str:
    return ".".join(part for part in name.split(".") if part not in modules)


def _unique(key: Key, names: Collection[str]) -> dict[str, str]:
    """Return the name of each key; a key that several names have is left out."""
    starting_at_zero = [row for row in SHIFTS if any(f".{row[0][0]}." in name for name in names)]
    rules = [(_dotted(old), _dotted(new)) for row in starting_at_zero for old, new in reversed(row)]
    keys = {name: key(_replaced(name, rules) if rules else name) for name in names}
    counts = Counter(keys.values())
    return {found: name for name, found in keys.items() if counts[found] == 1}


def _resolved(base: Tensors, tensors: Tensors, key: Key) -> tuple[dict[str, TensorInfo], dict[str, TensorInfo]]:
    """Return the tensors that mean one of the base's, under its name, and the others."""
    theirs = {found: base[name] for found, name in _unique(key, base).items()}
    mine = {found: tensors[name] for found, name in _unique(key, tensors).items()}
    renamed = {theirs[found].name: replace(mine[found], name=theirs[found].name) for found in mine if found in theirs}
    used = {mine[found].name for found in mine if found in theirs}
    for found, info in theirs.items():
        if found not in mine and (parts := _parts(found, info.shape, mine)):
            pieces = tuple(mine[part] for part in parts)
            renamed[info.name] = TensorInfo(info.name, pieces[0].dtype, info.shape, pieces=pieces)
            used |= {piece.name for piece in pieces}
    for found, info in mine.items():
        if found not in theirs and (parts := _parts(found, info.shape, theirs)):
            renamed |= _cut(info, [theirs[part] for part in parts])
            used.add(info.name)
    return renamed, {name: info for name, info in tensors.items() if name not in used}


def _cut(info: TensorInfo, parts: Sequence[TensorInfo]) -> dict[str, TensorInfo]:
    """Return views into a tensor: one for each part, under its name."""
    views, start = {}, info.start
    for part in parts:
        views[part.name] = replace(info, name=part.name, shape=part.shape, start=start)
        start += part.elements * info.dtype.itemsize
    return views


def _parts(key: str, shape: tuple[int, ...], tensors: Tensors) -> list[str]:
    """Return the keys of the tensors that one tensor holds, in order; [] if they are not all there, and of one type."""
    for fused, parts in FUSIONS:
        if not f".{key}".endswith(f".{fused}"):
            continue
        stem, experts = key.removesuffix(fused), "*" in parts[0]
        if len(shape) <= experts or f"{stem}{parts[0]}".replace("*", "0") not in tensors:
            continue
        rounds = range(shape[0] if experts else 1)
        # A header may declare any number of experts.
        if not 0 < len(rounds) <= len(tensors):
            continue
        names = [f"{stem}{part}".replace("*", str(index)) for index in rounds for part in parts]
        held = [tensors[name] for name in names if name in tensors]
        dtype, columns = held[0].dtype, shape[1 + experts :]
        rows = [info.shape[0] for info in held if info.shape and (info.dtype, info.shape[1:]) == (dtype, columns)]
        if len(rows) == len(names) and _fill(rows, len(parts), shape[int(experts)]):
            return names
    return []


def _fill(rows: Sequence[int], parts: int, expected: int) -> bool:
    """Return whether every `parts` numbers of rows in turn have the expected sum."""
    return all(sum(rows[first : first + parts]) == expected for first in range(0, len(rows), parts))

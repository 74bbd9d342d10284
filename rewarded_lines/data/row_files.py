"""Reads the files that `file:` names: one file, a folder, a pattern, or what `save_to_disk` of `datasets` wrote.

A folder's files are sorted as people count: `part-2` stands before `part-10`.
"""

from __future__ import annotations

import glob
import json
import os
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from rewarded_lines.data.file_rows import PACKED, Rows, file_type, read_arrow, read_csv, read_json, read_parquet
from rewarded_lines.errors import fail, listed
from rewarded_lines.references import fitting

_MOST_NAMES = 8
# The words that `datasets` reads as the name of a split.
_SPLITS = {
    "train": "train", "training": "train", "validation": "validation", "valid": "validation", "val": "validation",
    "dev": "validation", "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}")
# What `save_to_disk` writes beside a data set, and beside its splits.
_STATE, _DICT = "state.json", "dataset_dict.json"
_NO_DATA = (_STATE, _DICT, "dataset_info.json", "dataset_infos.json", "config.json")

_TEXTS: Mapping[str, Callable[[Path], Rows]] = {
    ".jsonl": read_json, ".json": read_json, ".ndjson": read_json, ".csv": read_csv,
    ".tsv": partial(read_csv, delimiter="\t"),
}  # fmt: skip
_READERS: Mapping[str, Callable[[Path], Rows]] = {**_TEXTS, ".parquet": read_parquet, ".arrow": read_arrow}
# Commands that make a readable file of another kind; `{file}` is the file's name.
_CONVERSIONS = {
    ".txt": """python -c "import json, sys; [print(json.dumps({{'prompt': one}})) """
    """for one in sys.stdin.read().splitlines()]" < {file} > {file}.jsonl""",
    ".xlsx": """python -c "import pandas, sys; pandas.read_excel(sys.argv[1])"""
    """.to_json(sys.argv[1] + '.jsonl', orient='records', lines=True)" {file}""",
    ".xz": "xz -dk {file}",
    ".zip": "python -m zipfile -e {file} {file}.unpacked",
    ".tar": "python -m tarfile -e {file} {file}.unpacked",
}
_CONVERSIONS[".tgz"] = _CONVERSIONS[".tar"]


def read_local(path: Path, split: str) -> Rows:
    """Yield the rows of all files that a path names, with their places."""
    for file in find_files(path, split):
        yield from _read_file(file)


def find_files(path: Path, split: str) -> list[Path]:
    """Return the files with the rows of a path, in order; refuse a slice such as `train[:80%]`.

    Args:
        path: a file; a folder of files of one type, or of `save_to_disk`; or a pattern such as `data/*.jsonl.gz`.
        split: the split to take if the names in a folder tell splits apart. A file and a pattern have no splits.
    """
    if any(mark in split for mark in "[+"):
        raise fail(
            "slices and sums of splits are for data sets of the Hub",
            where=str(path),
            expected="the name of a split",
            got=f"`split: {split}`",
            remedy="write the rows into files of their own, or take the first rows with `limit:`",
        )
    if path.is_dir():
        return _saved(path) if (path / _STATE).is_file() else _in_folder(path, split)
    if path.is_file():
        return [path]
    if not glob.has_magic(str(path)):
        raise fail(
            "no such file",
            where=str(path),
            expected="a file (JSON, CSV, Parquet, Arrow), a folder of files, or a pattern such as data/*.jsonl",
            remedy="`rewarded-lines demo --until data` makes the demo's corpus",
        )
    if files := sorted(fitting(path), key=_natural):
        return files
    folder = next(parent for parent in path.parents if parent.is_dir())
    got = listed(sorted(one.name for one in folder.iterdir()), _MOST_NAMES)
    raise fail("no file fits the pattern", where=str(path), expected="at least one", got=f"{folder} holds {got}")


def describe_files(path: Path, split: str) -> str:
    """Return which files are read, or "" for a single file that was named itself."""
    files = find_files(path, split)
    if files == [path]:
        return ""
    top = os.path.commonpath([file.parent for file in files])
    names = [os.path.relpath(file, top) for file in files]
    return f"{len(files)} files, from {names[0]} to {names[-1]}" if len(files) > 1 else f"the file {names[0]}"


def _is_readable(path: Path) -> bool:
    """Return whether the suffix of a file is known; only texts may be compressed."""
    return path.suffix.lower() in _READERS or file_type(path) in _TEXTS


def _read_file(path: Path) -> Rows:
    """Yield the rows of a file with their places; refuse other kinds of files."""
    if not _is_readable(path):
        conversion = _CONVERSIONS.get(file_type(path), "")
        raise fail(
            "not a file type that can be read",
            where=str(path),
            expected=f"{', '.join(_READERS)}; text also with {', '.join(PACKED)}",
            remedy=conversion.format(file=shlex.quote(str(path))),
        )
    yield from _READERS[file_type(path)](path)


def _natural(path: Path) -> list[tuple[int, int, str]]:
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in re.split(r"(\d+)", str(path))]


def _saved(folder: Path) -> list[Path]:
    """Return the files of a data set of `save_to_disk`, in the order of its `state.json`."""
    files = [folder / name for name in _listing(folder / _STATE, "_data_files")]
    if missing := [file.name for file in files if not file.is_file()]:
        got, remedy = listed(missing, _MOST_NAMES), "copy the whole folder again"
        raise fail("files of the data set are missing", where=str(folder), got=got, remedy=remedy)
    return files


def _listing(path: Path, key: str) -> list[str]:
    """Return the names that `save_to_disk` lists: of files, or of splits."""
    try:
        listing = json.loads(path.read_bytes())[key]
        return [str(one["filename"] if isinstance(one, dict) else one) for one in listing]
    except (OSError, ValueError, RecursionError, TypeError, KeyError) as error:
        got = f"{type(error).__name__}: {error}"
        raise fail("not as `save_to_disk` writes it", where=str(path), expected=f"a list `{key}`", got=got) from error


def _in_folder(folder: Path, split: str) -> list[Path]:
    if (folder / _DICT).is_file():
        return _saved(folder / _choose(_listing(folder / _DICT, "splits"), split, folder))
    sets: dict[str, list[Path]] = {}
    for file in sorted(folder.rglob("*"), key=_natural):
        inside = file.relative_to(folder)
        no_data = inside.name in _NO_DATA or any(part.startswith((".", "__")) for part in inside.parts)
        if _is_readable(file) and file.is_file() and not no_data:
            sets.setdefault(_split_of(inside), []).append(file)
    if not sets:
        got = listed(sorted(file.name for file in folder.iterdir()), _MOST_NAMES) or "nothing"
        raise fail("no file in the folder can be read", where=str(folder), expected="files with rows", got=got)
    # The names of one set of shards, such as `part-00000-of-00002`, tell no splits apart.
    words = re.split(r"[-._ 0-9]+", next(iter(sets)).lower())
    named = len(sets) > 1 or any(word in _SPLITS for word in words)
    files = sets[_choose(list(sets), split, folder) if named else next(iter(sets))]
    _check_alike(files, folder)
    return files


def _suffixes(file: Path) -> str:
    kind = file_type(file)
    return kind if kind == file.suffix.lower() else kind + file.suffix.lower()


def _split_of(inside: Path) -> str:
    """Return the split that a file's name or its folders' names tell, or ""."""
    if shard := _SHARD.match(inside.name):
        return shard[1]
    words = (word for part in inside.parts for word in re.split(r"[-._ 0-9]+", part.lower()))
    return next((_SPLITS[word] for word in words if word in _SPLITS), "")


def _choose(names: Sequence[str], split: str, folder: Path) -> str:
    """Return the name of the split, which another word may stand for, as `dev` does for `validation`."""
    alike = [name for name in names if _SPLITS.get(name, name) == _SPLITS.get(split, split)]
    if split in names or len(alike) == 1:
        return split if split in names else alike[0]
    raise fail(
        f"no split `{split}`",
        where=str(folder),
        expected="one of " + listed([name or "(files of no split)" for name in names], _MOST_NAMES),
        remedy="name one of them with `split:` (in a recipe `dataset_train_split` and `dataset_test_split`), "
        "or name the file itself",
    )


def _check_alike(files: Sequence[Path], folder: Path) -> None:
    """Refuse files of several types, and files of several folders: they may be other data, or the same twice."""
    for what, kinds in (
        ("files of several types", [_suffixes(file) for file in files]),
        ("files in several folders", [str(file.parent.relative_to(folder)) for file in files]),
    ):
        if len(set(kinds)) > 1:
            raise fail(
                what,
                where=str(folder),
                expected="rows of one kind",
                got=listed(list(dict.fromkeys(kinds)), _MOST_NAMES),
                remedy=f"name a file or a pattern, such as {files[0]}",
            )

"""Users' references: a folder or a Hub id, and a function as `module:name` or `file.py:name`.

Loading a function runs the code of its module, so only the user's own references are loaded.
"""

from __future__ import annotations

import glob
import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from rewarded_lines.errors import did_you_mean, fail


def looks_local(reference: str, root: Path = Path()) -> bool:
    """True if `reference` is a path, absolute or below `root`, rather than a Hub id `organisation/name`."""
    if not re.fullmatch(r"\w[\w.\-]*/[\w.\-]+", reference):
        return True
    return (root / reference.split("/")[0]).is_dir()


def local_path(reference: str, root: Path) -> Path:
    """Return the path of `reference`: below `root`, absolute, or in a home folder (`~`)."""
    return root / os.path.expanduser(reference)


def fitting(pattern: Path) -> list[Path]:
    """Return the files that fit a pattern such as `data/*.jsonl`, in no order."""
    # A folder that exists has a name, not a pattern, even if the name holds brackets.
    folder = next(parent for parent in pattern.parents if parent.is_dir())
    found = glob.glob(str(pattern.relative_to(folder)), root_dir=folder, recursive=True)
    return [folder / one for one in found if (folder / one).is_file()]


def relative(reference: str, folder: Path) -> str:
    """Return a path relative to a folder; a Hub id stays as it is."""
    if not Path(reference).exists():
        return reference
    return os.path.relpath(os.path.realpath(reference), os.path.realpath(folder))


def located(reference: str, folder: Path) -> str:
    """Return the absolute path of a path relative to a folder; a Hub id stays as it is."""
    path = Path(os.path.realpath(folder), reference)
    return os.path.realpath(path) if path.exists() else reference


def find_function(reference: str, root: Path, where: str) -> Callable[..., Any]:
    """Return the function `module:name` or `file.py:name`; files are relative to `root`.

    A name may be `object.method`.
    """
    source, separator, name = reference.rpartition(":")
    if not separator or not source or not name:
        raise fail(f"`{reference}` is not a function reference", where=where, expected="module:name or file.py:name")
    module = _imported(source, root, where)
    *owners, last = name.split(".")
    owner: Any = module
    for one in owners:
        owner = getattr(owner, one, None)
    function = getattr(owner, last, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise fail(
            f"no function `{name}` in {source}",
            where=where,
            expected="one of " + ", ".join(known) if known else "a function defined there",
            remedy=did_you_mean(name, known),
        )
    return cast(Callable[..., Any], function)


def _imported(source: str, root: Path, where: str) -> ModuleType:
    file = local_path(source, root) if source.endswith(".py") else None
    if file and not file.is_file():
        raise fail("no such file", where=where, got=str(file), remedy="check the path")
    try:
        return _run(file) if file else importlib.import_module(source)
    except Exception as error:  # noqa: BLE001 - a user's code may raise anything
        got = f"{type(error).__name__}: {error}"
        raise fail(f"importing {file or source} failed", where=where, got=got) from error


def _run(file: Path) -> ModuleType:
    name = "rewarded_lines_user_" + file.stem
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Pickling and dataclasses need the module registered before it runs.
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module

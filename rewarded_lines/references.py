"""Users' references: a folder or a Hub id, and a function as `module:name` or `file.py:name`.

Loading a function runs the code of its module, so only the user's own references are loaded.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from rewarded_lines.errors import UserError, did_you_mean, fail


def looks_local(reference: str, root: Path = Path()) -> bool:
    """True if `reference` is a path, absolute or below `root`, rather than a Hub id `organisation/name`."""
    if not re.fullmatch(r"\w[\w.\-]*/[\w.\-]+", reference):
        return True
    return (root / reference.split("/")[0]).is_dir()


def local_path(reference: str, root: Path) -> Path:
    """Return the path of `reference`: below `root`, absolute, or in a home folder (`~`)."""
    return root / os.path.expanduser(reference)


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
    """Return the function `module:name` or `file.py:name`; files are relative to `root`."""
    source, separator, name = reference.rpartition(":")
    if not separator or not source or not name:
        raise fail(f"`{reference}` is not a function reference", where=where, expected="module:name or file.py:name")
    module = _import_file(local_path(source, root), where) if source.endswith(".py") else _import_module(source, where)
    function = getattr(module, name, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise fail(
            f"no function `{name}` in {source}",
            where=where,
            expected="one of " + ", ".join(known) if known else "a function defined there",
            remedy=did_you_mean(name, known),
        )
    return cast(Callable[..., Any], function)


def _import_file(path: Path, where: str) -> ModuleType:
    if not path.is_file():
        raise fail("no such file", where=where, got=str(path), remedy="check the path")
    name = "rewarded_lines_user_" + path.stem
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Pickling and dataclasses need the module registered before it runs.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # noqa: BLE001 - a user's file may raise anything
        raise _import_failed(str(path), where, error) from error
    return module


def _import_module(name: str, where: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:  # noqa: BLE001 - a user's module may raise anything
        raise _import_failed(name, where, error) from error


def _import_failed(source: str, where: str, error: Exception) -> UserError:
    return fail(f"importing {source} failed", where=where, got=f"{type(error).__name__}: {error}")

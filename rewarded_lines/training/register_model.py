"""Adds a trained model to the project file: only its entry changes, comments and order stay."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML, YAMLError
from ruamel.yaml.scalarstring import DoubleQuotedScalarString
from yaml import YAMLError as PlainYAMLError

from rewarded_lines.errors import fail
from rewarded_lines.folders import locked, write_bytes
from rewarded_lines.projects import check_project, load_project
from rewarded_lines.yaml_files import yaml_value


def register(project_file: str, entries: Mapping[tuple[str, ...], Any]) -> list[str]:
    """Add entries to a project file, which is created if absent; return a sentence for each change.

    An entry is a value by its keys: `{("base",): "organisation/name", ("policies", "a"): Path("a")}`. A `Path`
    below the file's folder is written relative to it.

    Raises:
        UserError: the file is not a project file, or cannot be written.
    """
    path = Path(project_file)
    with _held(path):
        known = load_project(path).config.model_dump(mode="json") if path.exists() else {}
        yaml = YAML()
        yaml.preserve_quotes = True
        yaml.width = 4096
        content = yaml.load(path.read_text(encoding="utf-8")) if path.exists() else None
        content = {} if content is None else content
        changes = [_put(content, known, keys, _plain(value, path.parent)) for keys, value in entries.items()]
        made = [change for change in changes if change]
        if made:
            text = StringIO()
            yaml.dump(content, text)
            check_project(yaml_value(text.getvalue()), path)
            # If the name is a link, its target is written.
            write_bytes(path.resolve(), text.getvalue().encode())
        return [f"{project_file}: {change}" for change in made]


def _put(content: Any, known: Mapping[str, Any], keys: tuple[str, ...], value: Any) -> str:
    """Set an entry of the file's `content`; return the change, or "" if the project has the value.

    `known` is the whole project, with the files that this one extends.
    """
    before = _at(content, keys)
    if before is None and not isinstance(inherited := _at(known, keys), Mapping):
        before = inherited
    if before == value:
        return ""
    section = content
    for key in keys[:-1]:
        if section.get(key) is None:
            section[key] = {}
        section = section[key]
    section[_quoted(keys[-1])] = _quoted(value)
    change = f"{'.'.join(keys)}: {value}"
    return change if before is None else f"{change} (was {before})"


def _at(content: Any, keys: tuple[str, ...]) -> Any:
    for key in keys:
        content = content.get(key) if isinstance(content, Mapping) else None
    return content


def _quoted(value: Any) -> Any:
    """Quote a text that a YAML 1.1 reader takes for another type: `on` is true there."""
    try:
        plain = not isinstance(value, str) or yaml_value(value) == value
    except PlainYAMLError:
        plain = False
    return value if plain else DoubleQuotedScalarString(value)


def _plain(value: Any, root: Path) -> Any:
    """Return a path as text, relative to `root` if below it; any other value as it is."""
    if not isinstance(value, Path):
        return value
    full, below = value.resolve(), root.resolve()
    return str(full.relative_to(below)) if full.is_relative_to(below) else str(full)


@contextmanager
def _held(path: Path) -> Iterator[None]:
    """Lock the file's folder for the block, since policies are often trained side by side."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.parent):
            yield
    except OSError as error:
        raise fail("the project file cannot be written", where=str(path), got=str(error)) from error
    except YAMLError as error:
        raise fail("not readable as YAML", where=str(path), got=" ".join(str(error).split())) from error

"""A run's place in the project: it reads base and rewards there, and adds its own model to it.

The file is the user's: comments and order stay, and only the entry of this run changes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import Any

import blake3
from ruamel.yaml import YAML, YAMLError
from ruamel.yaml.scalarstring import DoubleQuotedScalarString
from yaml import YAMLError as PlainYAMLError
from yaml import safe_load

from rewarded_lines.config import GenerationSpec, decides
from rewarded_lines.engines.tokenizers import read_template
from rewarded_lines.errors import fail
from rewarded_lines.folders import locked, write_bytes
from rewarded_lines.projects import check_project, load_project

_TRAINS_BY = ("stop", "stop_token_ids", "chat_template", "chat_template_kwargs", "strip")


def generation_of(project_file: str) -> GenerationSpec:
    """Return the generation settings of a project; the usual ones where there is no project yet.

    Raises:
        UserError: the file is not a project file.
    """
    return load_project(project_file).generation if Path(project_file).is_file() else GenerationSpec()


def generation_inputs(spec: GenerationSpec) -> dict[str, str]:
    """Return the hash of what a project's generation settings change in training, as one of a run's inputs.

    Nothing where it sets nothing of that, so that runs of before remain what they were.
    """
    content = {name: value for name, value in decides(spec).items() if name in _TRAINS_BY and value}
    if spec.chat_template is not None:
        content["chat_template"] = read_template(spec.chat_template)
    told = json.dumps(content, sort_keys=True)
    return {"generation": blake3.blake3(told.encode("utf-8", "surrogatepass")).hexdigest()} if content else {}


def register(project_file: str, entries: Mapping[tuple[str, ...], Any]) -> list[str]:
    """Add entries to a project file, which is made if there is none; return what was changed, as text.

    Args:
        project_file: the file.
        entries: value by place, such as `{("base",): "organisation/model", ("policies", "brief"): Path("brief")}`; a
            `Path` is written relative to the file's folder where it lies below it.

    Raises:
        UserError: the file is not a project file.
    """
    path = Path(project_file)
    with _held(path):
        known = load_project(path).config.model_dump(mode="json") if path.exists() else {}
        yaml = YAML()
        yaml.preserve_quotes = True
        yaml.width = 4096
        content = yaml.load(path.read_text(encoding="utf-8")) if path.exists() else None
        content = {} if content is None else content
        changes = [_put(content, known, place, _value(value, path.parent)) for place, value in entries.items()]
        said = [change for change in changes if change]
        if said:
            text = StringIO()
            yaml.dump(content, text)
            check_project(safe_load(text.getvalue()), path)
            # The file itself where the name is a link to it.
            write_bytes(path.resolve(), text.getvalue().encode())
        return [f"{project_file}: {change}" for change in said]


def _put(content: Any, known: Mapping[str, Any], place: tuple[str, ...], value: Any) -> str:
    """Set an entry; return what changed, or "".

    Args:
        content: what the file itself says, which is changed.
        known: what the project says, with what the file extends.
        place: of the entry.
        value: of the entry.
    """
    before = _at(content, place)
    if before is None and not isinstance(inherited := _at(known, place), Mapping):
        before = inherited
    if before == value:
        return ""
    section = content
    for key in place[:-1]:
        if section.get(key) is None:
            section[key] = {}
        section = section[key]
    section[_quoted(place[-1])] = _quoted(value)
    name = ".".join(place)
    return f"{name}: {value}" if before is None else f"{name}: {value} (was {before})"


def _at(content: Any, place: tuple[str, ...]) -> Any:
    for key in place:
        content = content.get(key) if isinstance(content, Mapping) else None
    return content


def _quoted(value: Any) -> Any:
    """Return a text so that every reader of YAML takes it for one: `on` is a switch to those of version 1.1."""
    try:
        plain = not isinstance(value, str) or safe_load(value) == value
    except PlainYAMLError:
        plain = False
    return value if plain else DoubleQuotedScalarString(value)


def _value(value: Any, root: Path) -> Any:
    if isinstance(value, Mapping):
        return {key: _value(one, root) for key, one in value.items()}
    if not isinstance(value, Path):
        return value
    full, below = value.resolve(), root.resolve()
    return str(full.relative_to(below)) if full.is_relative_to(below) else str(full)


@contextmanager
def _held(path: Path) -> Iterator[None]:
    """Keep other recipes from changing the file at the same time: policies are often trained side by side."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.parent):
            yield
    except OSError as error:
        raise fail("the project file cannot be written", where=str(path), got=str(error)) from error
    except YAMLError as error:
        raise fail("not readable as YAML", where=str(path), got=" ".join(str(error).split())) from error

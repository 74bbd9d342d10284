"""Project files: read with the files that they extend, checked as a whole, written.

Unknown keys are refused at every depth, with the nearest known key. All paths, also those in an extended file, are
relative to the project file's folder, so that a project can be moved as a whole. Only `extends:` is relative to its own
file. Nothing here opens a model.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from rewarded_lines.config import CONTROL, GenerationSpec, ProjectConfig, is_one_set
from rewarded_lines.config_values import Strict
from rewarded_lines.errors import Problem, UserError, did_you_mean, fail, without_secrets
from rewarded_lines.references import local_path, looks_local
from rewarded_lines.yaml_files import read_yaml, yaml_text

PROJECT_FILE = "rewarded-lines.yaml"
EXTENDS = "extends"
_MOST_KEYS_SHOWN = 20
# A schedule that is neither coefficients nor POLICY=…
_FILE_NAME = r"[^=]*[^-+\d.eE,\s=][^=]*"


@dataclass(frozen=True)
class Project:
    """A parsed project file; `files` are this file and those that it extends, with their contents."""

    path: Path
    config: ProjectConfig
    files: tuple[tuple[Path, Mapping[str, Any]], ...] = ()

    @property
    def root(self) -> Path:
        """Return the folder that paths in the project are relative to."""
        return self.path.parent

    @property
    def generation(self) -> GenerationSpec:
        """Return the generation settings, with a chat template's path from the working directory."""
        spec = self.config.generation
        if spec.chat_template is None:
            return spec
        return spec.model_copy(update={"chat_template": str(local_path(spec.chat_template, self.root))})

    def where(self, *keys: str) -> str:
        """Return the file and the keys of an entry, for messages."""
        found = (path for path, content in self.files if _has(content, keys))
        return f"{next(found, self.path)}: {'.'.join(keys)}"

    def resolve(self, reference: str) -> str:
        """Return a project's path as one from the working directory; a Hub id (no such folder) stays as it is.

        A name that only the working directory has is taken for a path of the project, where it is missing.
        """
        local = looks_local(reference, self.root) or Path(reference).exists()
        return str(local_path(reference, self.root)) if local else reference

    @property
    def carried(self) -> dict[str, str]:
        """Return whose files merges get, as arguments of `merge`, with a usable path of a tokenizer's folder."""
        given, config_from = self.config.tokenizer, self.config.config_from
        known = given in ("auto", "base", *self.config.policies)
        return {"tokenizer": given if known else self.resolve(given), "config_from": config_from}

    def require(self, *keys: str) -> None:
        """Refuse a project that lacks top-level `keys`, with every missing key at once."""
        if missing := [key for key in keys if not getattr(self.config, key)]:
            raise UserError(Problem(f"`{key}` is missing", where=str(self.path)) for key in missing)


def load_project(path: Path | str = PROJECT_FILE) -> Project:
    """Read a `rewarded-lines.yaml` or a suite; a UserError has every fault of a file at once."""
    path = Path(path)
    remedy = f"name it with --config, or work in a folder that has a {PROJECT_FILE}"
    files = _files(read_yaml(path, remedy), path)
    return Project(path, _combined(files), files)


def check_project(content: Mapping[str, Any], path: Path) -> ProjectConfig:
    """Check the content of a project file at `path`, with the files that it extends; see `load_project`."""
    return _combined(_files(content, path))


def _files(content: Mapping[str, Any], path: Path) -> tuple[tuple[Path, Mapping[str, Any]], ...]:
    """Return a file and its content, then those of the file that it `extends:`, and so on."""
    files = [(path, content)]
    while EXTENDS in content:
        source, seen = _source(content[EXTENDS], path), [one.resolve() for one, _ in files]
        if source.resolve() in seen:
            got = " → ".join(map(str, [*seen, source.resolve()]))
            raise fail("the file extends itself", where=f"{path}: {EXTENDS}", got=got)
        content = read_yaml(source, f"correct it, or `{EXTENDS}:` in {path}")
        path = source
        files.append((path, content))
    return tuple(files)


def _combined(files: Sequence[tuple[Path, Mapping[str, Any]]]) -> ProjectConfig:
    """Return the configuration of the files: each overrides those after it."""
    below: Mapping[str, Any] = {}
    for path, content in reversed(files):
        below = _over(below, {key: value for key, value in content.items() if key != EXTENDS})
        try:
            config = ProjectConfig.model_validate(below)
        except ValidationError as error:
            # Each step is checked, so that a fault is reported for its own file.
            raise UserError(problems_of(error, str(path))) from error
    return config


def _has(content: Any, keys: Sequence[str]) -> bool:
    """True if a file has an entry at `keys`; the last key may be an element of a list."""
    for key in keys:
        if isinstance(content, list):
            return key in content
        if not isinstance(content, Mapping) or key not in content:
            return False
        content = content[key]
    return True


def _source(name: Any, path: Path) -> Path:
    source = local_path(name, path.parent) if isinstance(name, str) else None
    # Not Path.is_file, which raises for names that the system refuses.
    if source is None or not os.path.isfile(source):
        expected = "one project file or suite, its path from the folder of this file"
        raise fail("no such file", where=f"{path}: {EXTENDS}", expected=expected, got=str(source or repr(name)))
    return source


def _over(under: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of a file, `own`, merged over that of the file that it extends."""
    merged = _merged(under, own)
    both = {key for key in own if isinstance(under.get(key), Mapping) and isinstance(own[key], Mapping)}
    if CONTROL in both and (is_one_set(under[CONTROL]) or is_one_set(own[CONTROL])):
        merged[CONTROL] = own[CONTROL]
    if "sweep" in both:
        sweep = own["sweep"]
        # Methods are replaced, not merged.
        if sweep.get("methods") is not None:
            merged["sweep"]["methods"] = sweep["methods"]
        # `points` and `step` exclude each other.
        for one, other in (("points", "step"), ("step", "points")):
            if one in sweep and other not in sweep:
                merged["sweep"].pop(other, None)
    return merged


def _merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return `under` with the keys of `over`: mappings are merged, null removes a key, anything else replaces it."""
    merged = dict(under)
    for key, value in over.items():
        before = under.get(key)
        if value is None and key in under:
            del merged[key]
        elif isinstance(before, Mapping) and isinstance(value, Mapping):
            merged[key] = _merged(before, value)
        else:
            merged[key] = value
    return merged


def named_places(value: Any, keys: tuple[str, ...] = ()) -> Iterator[tuple[str, str, str]]:
    """Yield every place that a configuration, or the part at `keys`, names: its key, its kind and its name.

    The kinds are "model" (a folder or Hub id), "code" (a Python file or a chat template), "data" (files) and "schedule"
    (a file with coefficients).
    """
    if isinstance(value, Mapping):
        for key, one in value.items():
            # A template's variable may be called `model` or `file`.
            if key != "chat_template_kwargs":
                yield from named_places(one, (*keys, str(key)))
    elif isinstance(value, str):
        key, last, file = ".".join(keys), keys[-1], value.rpartition(":")[0]
        if (
            keys[0] in ("base", "policies", "baselines")
            or last in ("model", "judge")
            or (keys[0], last) == ("rewards", "tokenizer")
        ):
            yield key, "model", value
        elif last in ("function", "rows") and file.endswith(".py"):
            yield key, "code", file
        elif last in ("file", "chat_template"):
            yield key, "data" if last == "file" else "code", value
        elif keys[:2] == ("sweep", "methods") and keys[3:4] == ("schedule",) and re.fullmatch(_FILE_NAME, value):
            yield key, "schedule", value


def with_places(value: Any, moved: Callable[[str, str], str], keys: tuple[str, ...] = ()) -> Any:
    """Return a configuration, or the part at `keys`, with `moved(kind, name)` for every name of `named_places`."""
    if isinstance(value, Mapping):
        plain = {key: one for key, one in value.items() if key == "chat_template_kwargs"}
        return {key: with_places(one, moved, (*keys, str(key))) for key, one in value.items()} | plain
    for _, kind, name in named_places(value, keys):
        # A function is named behind its file.
        value = moved(kind, name) + value.removeprefix(name)
    return value


# What pydantic calls a dictionary and a tuple.
_SHAPES = {kind: "a mapping: lines `KEY: VALUE`, or {KEY: VALUE}" for kind in ("dict_type", "model_type")}
_SHAPES["tuple_type"] = "a list: [VALUE, …]"


def problems_of(error: ValidationError, where: str) -> list[Problem]:
    """Return pydantic's errors as problems of the place `where`."""
    return [_problem(where, detail) for detail in error.errors()]


def save_project(path: Path, config: ProjectConfig) -> None:
    """Write `config` as YAML, without default values."""
    content = config.model_dump(mode="json", exclude_defaults=True)
    path.write_text(yaml_text(content), encoding="utf-8")


def unknown_key(key: str, known: list[str], where: str) -> Problem:
    """Return the problem of an unknown key, with the nearest known one."""
    # A trainer has almost two hundred keys: too many to list, and one of them is always a little like the unknown one.
    many = len(known) > _MOST_KEYS_SHOWN
    remedy = did_you_mean(key, known, "remove it, or see --help for the known keys", 0.8 if many else 0.5)
    return Problem(f"unknown key `{key}`", where, "" if many else "one of " + ", ".join(known), remedy=remedy)


def _problem(place: str, detail: ErrorDetails) -> Problem:
    location = [str(part) for part in detail["loc"]]
    if location[:2] == [CONTROL, CONTROL]:
        del location[1]  # The user gave this set no name.
    if detail["type"] == "extra_forbidden":
        known = [*_section(location[:-1]).model_fields, *([] if location[:-1] else [EXTENDS])]
        return unknown_key(location[-1], known, ": ".join([place, ".".join(location[:-1]) or "top level"]))
    what, got, remedy = detail["msg"].removeprefix("Value error, "), without_secrets(repr(detail["input"])), ""
    # YAML reads yes, no, 1 and 2026-11-28 as values.
    if location[-1:] == ["[key]"]:
        what, location, remedy = "a name that is no text", location[:-2], "write the name in quotes"
    elif detail["type"] == "string_type" and isinstance(detail["input"], int | float | date):
        remedy = "write it in quotes"
    return Problem(
        what,
        where=f"{place}: {'.'.join(location)}" if location else place,
        expected=_SHAPES.get(detail["type"], ""),
        got=got if len(got) <= 80 else got[:77] + "...",
        remedy=remedy,
    )


def _section(location: list[str]) -> type[Strict]:
    """Return the model of the keys at `location`, e.g. ["rewards", "positive"] → RewardSpec."""
    section: type[Strict] = ProjectConfig
    for key in location:
        if key in section.model_fields:
            kinds = _kinds(section.model_fields[key].annotation)
            section = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Strict)), section)
    return section


def _kinds(annotation: Any) -> list[Any]:
    """Return the types in an annotation, e.g. dict[str, RewardSpec | None] → str, RewardSpec, None."""
    parts = get_args(annotation)
    return [kind for part in parts for kind in _kinds(part)] if parts else [annotation]

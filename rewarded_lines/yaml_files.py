"""YAML, read and written: a key given twice is refused, and 1e-6 is a number."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from rewarded_lines.errors import fail


class _Loader(yaml.SafeLoader):
    """Refuses a repeated key; PyYAML silently keeps the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            name = (key.tag, str(key.value))
            if name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"`{key.value}` is given twice", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes the texts that `_Loader` takes for numbers."""


for _kind in (_Loader, _Dumper):
    # Numbers of YAML 1.2 and JSON; for PyYAML, which follows YAML 1.1, these are texts.
    _number = re.compile(r"[-+]?(\d[\d_]*(\.[\d_]*)?|\.\d+)[eE][-+]?\d{1,3}$")
    _kind.add_implicit_resolver("tag:yaml.org,2002:float", _number, list("-+.0123456789"))


def read_yaml(path: Path, remedy: str = "") -> dict[str, Any]:
    """Return the mapping in a YAML file; `remedy` is for a file that is missing or no mapping."""
    if not path.is_file():
        other = path.with_suffix(".yml" if path.suffix == ".yaml" else ".yaml")
        remedy = f"did you mean `{other.name}`?" if other.is_file() else remedy
        raise fail("no such file", where=str(path), expected="a YAML file", remedy=remedy)
    try:
        # Bytes: some editors write UTF-16.
        content = yaml_value(path.read_bytes())
    except OSError as error:
        raise fail("cannot be read", where=str(path), got=str(error)) from error
    # PyYAML raises ValueError for an impossible date or number.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        got = " ".join(str(error).replace(' in "<byte string>",', " at").split())
        raise fail("not readable as YAML", where=str(path), got=got) from error
    if not isinstance(content, dict):
        got = "an empty file" if content is None else type(content).__name__
        raise fail("not a mapping", where=str(path), expected="key: value lines", got=got, remedy=remedy)
    return content


def yaml_value(text: str | bytes) -> Any:
    """Return what a text means in YAML; a `yaml.YAMLError` or ValueError for a text that is none."""
    return yaml.load(text, Loader=_Loader)  # noqa: S506 - it is a safe one


def yaml_text(content: Any) -> str:
    """Return YAML that `read_yaml` reads as the same content."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True)

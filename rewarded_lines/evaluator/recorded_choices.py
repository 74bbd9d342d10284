"""The choices that a run folder remembers, each by a name: `choose` writes them, `serve` answers requests by them.

They are in `chosen.json`. A run of another configuration in the same folder removes them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from rewarded_lines.errors import fail
from rewarded_lines.evaluator.points import PointSpec
from rewarded_lines.folders import json_object_in, write_json

CHOICES_FILE = "chosen.json"
CHOSEN = "chosen"
# What a server calls the point that it answers with if a request names none.
DEFAULT = "default"
_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"


def check_name(name: str) -> None:
    """Refuse a name that no request could ask for, or that a server uses itself."""
    if re.fullmatch(_NAME, name) is None or name == DEFAULT:
        expected = f"up to 64 letters, digits, dots, underscores and dashes, and not `{DEFAULT}`"
        raise fail("not a name for a choice", where="--name", expected=expected, got=name)


def record_choice(folder: Path, name: str, point: PointSpec, facts: Mapping[str, Any]) -> bool:
    """Write a choice into a run folder in place of an earlier one of its name; False if the folder is read-only."""
    path = folder / CHOICES_FILE
    with suppress(OSError):
        write_json(path, {**json_object_in(path), name: {"point": point.as_dict(), **facts}})
        return True
    return False


def recorded_choices(folder: Path) -> dict[str, PointSpec]:
    """Return the points that a run folder remembers, by name.

    Raises:
        UserError: the file is damaged.
    """
    path = folder / CHOICES_FILE
    content = json_object_in(path)
    try:
        if path.is_file() and not content:
            raise ValueError("no JSON object")
        return {name: PointSpec.from_dict(one["point"]) for name, one in content.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        remedy = "remove the file, and run `rewarded-lines choose` again"
        raise fail("its choices cannot be read", where=str(path), got=repr(error)[:200], remedy=remedy) from error

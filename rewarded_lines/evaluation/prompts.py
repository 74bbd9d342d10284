"""Prompts of an evaluation: a JSONL file, read strictly, in the order given."""

from __future__ import annotations

import json

from rewarded_lines.config import Project
from rewarded_lines.errors import fail


def load_prompts(project: Project) -> list[str]:
    """Return the prompts that the project's `prompts:` section names, the first `limit` of them.

    Raises:
        UserError: the section or the file is missing, a line is not JSON or has no `prompt`, or there is none.
    """
    project.require("prompts")
    spec = project.config.prompts
    assert spec is not None
    path = project.root / spec.file
    if not path.is_file():
        raise fail("no such file", where=f"{project.path}: prompts.file", got=str(path))
    prompts: list[str] = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if spec.limit is not None and len(prompts) == spec.limit:
                break
            if line.strip():
                prompts.append(_prompt(line, f"{path}, line {number}"))
    if not prompts:
        raise fail("no prompts in the file", where=str(path), expected='lines such as {"prompt": "..."}')
    return prompts


def _prompt(line: str, where: str) -> str:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise fail("not JSON", where=where, got=str(error)) from error
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise fail("no `prompt` text", where=where, expected='{"prompt": "..."}', got=found)
    return str(row["prompt"])

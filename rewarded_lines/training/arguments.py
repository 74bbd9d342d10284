"""How a recipe is told what to do: `--config FILE.yaml`, then overrides on the command line, both strict.

The keys are the fields of the recipe's dataclasses: its own and the trainer's configuration. A key that none
of them has is refused with the nearest one that exists, wherever it was written.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, cast

from transformers import HfArgumentParser

from rewarded_lines.config import read_yaml, unknown_key
from rewarded_lines.errors import Problem, UserError, fail
from rewarded_lines.processes import die_with_parent


class _Parser(HfArgumentParser):
    """An argument parser whose complaints are `UserError`s."""

    def error(self, message: str) -> NoReturn:
        raise fail(message, where="arguments of the recipe")


def parse_recipe(dataclass_types: Sequence[type], argv: Sequence[str]) -> tuple[Any, ...]:
    """Return one instance of each dataclass, filled from `--config` and then from the command line.

    Args:
        dataclass_types: the recipe's own dataclasses and the trainer's configuration; their fields must
            differ.
        argv: the arguments, without the program's name.

    Raises:
        UserError: unknown keys (all of them at once), values of the wrong kind, or required ones missing.
    """
    parser = _Parser(cast(Any, list(dataclass_types)), allow_abbrev=False)
    known = [field.name for cls in dataclass_types for field in dataclasses.fields(cls) if field.init]
    config, overrides = _split_config(list(argv))
    content = read_yaml(config) if config else {}
    problems = [unknown_key(str(key), known, str(config)) for key in content if key not in known]
    problems += _unknown_options(overrides, known)
    if problems:
        raise UserError(problems)
    parser.set_defaults(**{key: None for key, value in content.items() if value is None})
    arguments = [word for key, value in content.items() for word in _as_words(key, value)]
    *instances, rest = parser.parse_args_into_dataclasses(
        arguments + overrides, return_remaining_strings=True, look_for_args_file=False
    )
    if rest:
        raise fail("values that belong to no key", where="arguments of the recipe", got=" ".join(rest))
    return tuple(instances)


def run_recipe(main: Callable[[Sequence[str]], None]) -> None:
    """Run a recipe's `main` as a program: a user's mistake is printed as text, and the exit code is 1."""
    die_with_parent()
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(1)


def _split_config(argv: list[str]) -> tuple[Path | None, list[str]]:
    """Take `--config FILE` (or `--config=FILE`) out of the arguments."""
    for index, word in enumerate(argv):
        if word.startswith("--config="):
            return Path(word.removeprefix("--config=")), argv[:index] + argv[index + 1 :]
        if word == "--config":
            if index + 1 == len(argv):
                raise fail("--config names no file", where="command line", expected="--config FILE.yaml")
            return Path(argv[index + 1]), argv[:index] + argv[index + 2 :]
    return None, argv


def _unknown_options(argv: Sequence[str], known: list[str]) -> list[Problem]:
    problems = []
    for word in argv:
        key = word[2:].partition("=")[0].replace("-", "_")
        # The parser also takes `--no_KEY` for a switch that is on by default, and `--help`.
        if word.startswith("--") and key.removeprefix("no_") not in [*known, "help"] and key not in known:
            problems.append(unknown_key(key, known, "command line"))
    return problems


def _as_words(key: str, value: Any) -> list[str]:
    """Return a YAML entry as the command-line words that say the same, so both are checked by one parser."""
    if value is None:
        return []
    if isinstance(value, list):
        return [f"--{key}", *(str(item) for item in value)]
    return [f"--{key}={json.dumps(value) if isinstance(value, (dict, bool)) else value}"]

"""How a recipe is told what to do: `--config FILE.yaml`, then overrides on the command line, both strict.

The keys are the fields of the recipe's dataclasses: its own and the trainer's configuration. A key that none
of them has is refused with the nearest one that exists, wherever it was written.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn, cast

from transformers import HfArgumentParser

from rewarded_lines.errors import Problem, UserError, fail
from rewarded_lines.processes import die_with_parent, termination_as_exit
from rewarded_lines.projects import read_yaml, unknown_key

_GRACE_SECONDS = 5.0


class Arguments(tuple[Any, ...]):
    """The instances that `parse_recipe` made, and the keys that were given for them.

    Attributes:
        given: in the file or on the command line.
    """

    given: frozenset[str] = frozenset()


class _Parser(HfArgumentParser):
    """An argument parser whose complaints are `UserError`s."""

    def error(self, message: str) -> NoReturn:
        raise fail(message, where="arguments of the recipe")


def parse_recipe(dataclass_types: Sequence[type], argv: Sequence[str], description: str = "") -> Arguments:
    """Return one instance of each dataclass, filled from `--config` and then from the command line.

    What neither says follows the machine where it must: without a GPU, or with one that lacks bfloat16, `bf16` is off.
    `effective_batch_size`, where a recipe has it, becomes gradient accumulation.

    Args:
        dataclass_types: the recipe's own dataclasses and the trainer's configuration; their fields must
            differ.
        argv: the arguments, without the program's name.
        description: what `--help` says first.

    Raises:
        UserError: unknown keys (all of them at once), values of the wrong kind, or required ones missing.
    """
    parser = _Parser(
        cast(Any, list(dataclass_types)),
        allow_abbrev=False,
        # Two hundred options on the first screen would help nobody.
        usage="accelerate launch recipes/%(prog)s --config FILE.yaml [--KEY VALUE ...]",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", metavar="FILE.yaml", help="the keys below, in a file; the command line overrules")
    known = [field.name for cls in dataclass_types for field in dataclasses.fields(cls) if field.init]
    config, overrides = _split_config(list(argv))
    content = read_yaml(config) if config else {}
    problems = [unknown_key(str(key), known, str(config)) for key in content if key not in known]
    problems += _unknown_options(overrides, known)
    if problems:
        raise UserError(problems)
    overrides, unset = _take_nulls(overrides, known)
    content |= dict.fromkeys(unset)
    given = frozenset(map(str, content)) | {_key_of(word, known) for word in overrides if word.startswith("--")}
    parser.set_defaults(**{key: None for key, value in content.items() if value is None})
    words = [word for key, value in content.items() for word in _as_words(key, value)]
    words += _follow_machine(given, known) + overrides
    words += _accumulation(words, given)
    try:
        *instances, rest = parser.parse_args_into_dataclasses(
            words, return_remaining_strings=True, look_for_args_file=False
        )
    except (ValueError, TypeError) as error:
        # What the configurations themselves check when they are made.
        raise fail(str(error), where="arguments of the recipe") from error
    if rest:
        raise fail("values that belong to no key", where="arguments of the recipe", got=" ".join(rest))
    arguments = Arguments(one for one in instances if not isinstance(one, argparse.Namespace))
    arguments.given = given
    _check_reports(arguments)
    return arguments


@contextmanager
def trainer_settings() -> Iterator[None]:
    """Turn what a trainer says of its settings when it is built into a user's message.

    Raises:
        UserError: the trainer does not take them.
    """
    try:
        yield
    except (ValueError, NotImplementedError, AssertionError) as error:
        what = "the trainer does not take these settings"
        raise fail(what, where="arguments of the recipe", got=" ".join(str(error).split())) from error


def run_recipe(main: Callable[[Sequence[str]], None]) -> None:
    """Run a recipe's `main` as a program: a user's mistake is printed as text, and the exit code is 1.

    Of several processes the first one speaks. The others wait for the launcher to end them with it, and speak only if
    the fault is theirs alone.
    """
    die_with_parent()
    try:
        with termination_as_exit():
            main(sys.argv[1:])
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        if rank != "0":
            time.sleep(_GRACE_SECONDS)
        sys.stderr.write(f"{error}\n" if rank == "0" else f"process {rank}: {error}\n")
        sys.stderr.flush()
        # At once: a process that waits for the others in some collective call would never end.
        os._exit(1) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else sys.exit(1)


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
    keys = [_key_of(word, known) for word in argv if word.startswith("--")]
    return [unknown_key(key, known, "command line") for key in keys if key not in [*known, "help"]]


def _key_of(word: str, known: list[str]) -> str:
    """Return the key that an option sets; the parser also takes `--no_KEY` for a switch that is on by default."""
    key = word[2:].partition("=")[0].replace("-", "_")
    return key if key in known else key.removeprefix("no_") if key.removeprefix("no_") in known else key


def _follow_machine(given: Collection[str], known: Collection[str]) -> list[str]:
    """Return the words for keys that nobody has given and whose usual value would fail or do nothing here."""
    import torch

    gpu = torch.cuda.is_available()
    words = {}
    if not set(given) & {"bf16", "fp16"} and not (gpu and torch.cuda.is_bf16_supported()):
        words["bf16"] = "false"
    if not gpu:
        words |= {"use_cpu": "true", "dataloader_pin_memory": "false"}
    if find_spec("tensorboard") is not None:
        words["report_to"] = "tensorboard"
    return [f"--{key}={value}" for key, value in words.items() if key in known and key not in given]


def _check_reports(arguments: Arguments) -> None:
    """Refuse trackers that do not exist or are not installed, which the trainer would only miss when it is built.

    Raises:
        UserError: naming them.
    """
    from transformers.integrations import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

    wanted = [name for part in arguments for name in getattr(part, "report_to", None) or []]
    present = get_available_reporting_integrations()
    problems = []
    for name in wanted:
        if name not in ("all", "none") and name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join([*INTEGRATION_TO_CALLBACK, "none"])
            problems.append(Problem(f"unknown tracker `{name}`", where="report_to", expected=f"one of {known}"))
        elif name not in ("all", "none") and name not in present:
            remedy = f"pip install {name}, or set `report_to: none`"
            problems.append(Problem(f"`{name}` is not installed", where="report_to", remedy=remedy))
    if problems:
        raise UserError(problems)


def _accumulation(words: Sequence[str], given: Collection[str]) -> list[str]:
    """Return the gradient accumulation that makes the batch of all processes the effective one.

    Raises:
        UserError: the batch cannot be made of whole batches of every process, or two numbers contradict each other.
    """
    values = dict(word[2:].partition("=")[::2] for word in _joined(words))
    if "effective_batch_size" not in values:
        return []
    effective, each = values["effective_batch_size"], values.get("per_device_train_batch_size", "8")
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    try:
        if int(each) < 1 or int(effective) < 1:
            raise fail("not a batch", where="effective_batch_size", expected="1 or more examples", got=effective)
    except ValueError:
        # The parser says of both what is wrong with them.
        return []
    steps, rest = divmod(int(effective), int(each) * processes)
    stated = values.get("gradient_accumulation_steps", str(steps))
    if rest or not steps or (stated != str(steps) and "gradient_accumulation_steps" in given):
        raise fail(
            "the effective batch cannot be made of whole batches"
            if rest or not steps
            else "`effective_batch_size` and `gradient_accumulation_steps` contradict each other",
            where="effective_batch_size",
            expected=f"a multiple of {each} examples × {processes} processes"
            if rest or not steps
            else f"{each} × {stated} × {processes} = {int(each) * int(stated) * processes}",
            got=effective,
            remedy="change `per_device_train_batch_size`, or leave `gradient_accumulation_steps` out",
        )
    return [f"--gradient_accumulation_steps={steps}"]


def _take_nulls(argv: Sequence[str], known: list[str]) -> tuple[list[str], list[str]]:
    """Take `--KEY null` out of the command line, which unsets a key of the file; return the rest, and those keys."""
    rest: list[str] = []
    unset = []
    for word in argv:
        if word == "null" and rest and rest[-1].startswith("--") and "=" not in rest[-1]:
            unset.append(_key_of(rest.pop(), known))
        elif word.startswith("--") and word.partition("=")[2] == "null":
            unset.append(_key_of(word, known))
        else:
            rest.append(word)
    return rest, unset


def _joined(words: Sequence[str]) -> list[str]:
    """Return options as `--key=value`, also those whose value is the next word."""
    joined: list[str] = []
    for word in words:
        if word.startswith("--") or not joined:
            joined.append(word)
        elif "=" not in joined[-1]:
            joined[-1] += f"={word}"
    pairs = [word[2:].partition("=") for word in joined]
    return [f"--{key.replace('-', '_')}={value}" for key, _, value in pairs]


def _as_words(key: str, value: Any) -> list[str]:
    """Return a YAML entry as the command-line words that say the same, so both are checked by one parser."""
    if value is None:
        return []
    if isinstance(value, list):
        return [f"--{key}", *(str(item) for item in value)]
    return [f"--{key}={json.dumps(value) if isinstance(value, (dict, bool)) else value}"]

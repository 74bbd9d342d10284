"""A recipe's arguments: `--config FILE.yaml`, then overrides on the command line.

The keys are the fields of the recipe's dataclasses: its own and the trainer's. Unknown keys are refused.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn, cast, get_args, get_origin, get_type_hints

import torch
from transformers import HfArgumentParser

from rewarded_lines.errors import UserError, fail
from rewarded_lines.processes import die_with_parent, termination_as_exit
from rewarded_lines.training.refused_keys import check_trackers, check_trainer, unknown_recipe_key
from rewarded_lines.yaml_files import read_yaml

WHERE = "arguments of the recipe"
_GRACE_SECONDS = 5.0
_PATIENCE_SECONDS = 24 * 3600
# transformers and TRL annotate these as text, but take true and false as well.
_TRUE_OR_TEXT = ("fsdp", "scale_rewards")
_ROUND = (
    "that batch is `per_device_train_batch_size` × `steps_per_generation`, by default `gradient_accumulation_steps`, "
    "× the number of processes: change one of these, or `num_generations`"
)
# What vLLM and earlier versions of transformers write for "no limit", and the word of today's transformers.
_OFF: dict[str, tuple[Any, Any]] = {"top_k": (-1, 0), "max_grad_norm": (None, 0.0)}
# Keys of folders and files; those of the data and `output_dir` are read so elsewhere.
_PATHS = ("model_name_or_path", "project_file", "critic_model", "chat_template_path", "pairs_file", "samples_file")
# The variable in which `accelerate launch` passes the precision of its own configuration on.
_PRECISION = "ACCELERATE_MIXED_PRECISION"


class Arguments(tuple[Any, ...]):
    """The instances from `parse_recipe`; `given` are the keys set in the file or on the command line."""

    given: frozenset[str] = frozenset()


class _Parser(HfArgumentParser):
    """An argument parser that raises `UserError`."""

    def error(self, message: str) -> NoReturn:
        raise fail(message, where=WHERE)


def parse_recipe(dataclass_types: Sequence[type], argv: Sequence[str], description: str = "") -> Arguments:
    """Return one instance of each dataclass, filled from `--config` and then from the command line.

    Unless set, `bf16` is off on machines that lack it. `effective_batch_size` sets the gradient accumulation.

    Raises:
        UserError: unknown keys (all of them at once), wrong or missing values.
    """
    parser = _Parser(
        cast(Any, list(dataclass_types)),
        allow_abbrev=False,
        # The usual usage line would list two hundred options.
        usage="accelerate launch recipes/%(prog)s --config FILE.yaml [--KEY VALUE ...]",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    refused = {name for cls in dataclass_types for name in getattr(cls, "REFUSED", ())}
    for action in parser._actions:
        if action.dest in refused:
            action.help = argparse.SUPPRESS
    parser.add_argument("--config", metavar="FILE.yaml", help="the keys below, in a file; options override it")
    lists = _widen(parser, dataclass_types)
    fields = [[field.name for field in dataclasses.fields(cls) if field.init] for cls in dataclass_types]
    known = [name for names in fields for name in names]
    content, options = _sources(argv, known)
    single = {one.dest for one in parser._actions if one.nargs is None and one.type in (str, int, float)}
    for key, value in content.items():
        if isinstance(value, list) and len(value) != 1 and key in single:
            raise fail("this key takes one value", where=key, got=", ".join(map(str, value)) or "none")
    content |= {_key_of(name, known): None for name, value in options if value == ["null"]}
    given = frozenset([*map(str, content), *(_key_of(name, known) for name, _ in options)])
    # YAML reads the choice `no` as false.
    no = {action.dest for action in parser._actions if "no" in map(str, action.choices or ())}
    content |= {key: "no" for key in no if content.get(key) is False}
    parser.set_defaults(**{key: None for key, value in content.items() if value is None})
    words = [word for key, value in content.items() for word in _as_words(key, value)]
    words += [word for name, value in options if value != ["null"] for word in _as_words(name, value)]
    values, rest = parser.parse_known_args(words)
    if rest:
        raise fail("values that belong to no key", where=WHERE, got=" ".join(rest))
    _unify(values, lists)
    _follow_machine(values, given)
    _set_accumulation(values, given)
    try:
        made = [
            cls(**{name: getattr(values, name) for name in names})
            for cls, names in zip(dataclass_types, fields, strict=True)
        ]
    except (ValueError, TypeError) as error:
        remedy = _ROUND if "divisible by num_generations" in str(error) else ""
        raise fail(str(error), where=WHERE, remedy=remedy) from error
    arguments = Arguments(made)
    arguments.given = given
    check_trackers(arguments)
    check_trainer(arguments, arguments.given)
    return arguments


@contextmanager
def trainer_settings() -> Iterator[None]:
    """Raise a trainer's complaint about its settings as a `UserError`."""
    try:
        yield
    except (ValueError, NotImplementedError, AssertionError) as error:
        what = "the trainer does not take these settings"
        raise fail(what, where=WHERE, got=" ".join(str(error).split())) from error


def run_recipe(main: Callable[[Sequence[str]], None]) -> None:
    """Run a recipe's `main` as a program; a `UserError` is printed as text and makes the exit code 1.

    The first process prints it at once. The others wait for the launcher to end them, and print it only if it does not.
    """
    die_with_parent()
    try:
        with termination_as_exit():
            main(sys.argv[1:])
    except ImportError as error:
        _end(fail("these settings need a library that is missing or does not fit", where=WHERE, got=str(error)))
    except UserError as error:
        _end(error)


def _end(error: UserError) -> NoReturn:
    """Print an error and end this process; see `run_recipe`."""
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        time.sleep(_GRACE_SECONDS)
    sys.stderr.write(f"{error}\n" if rank == "0" else f"process {rank}: {error}\n")
    sys.stderr.flush()
    # Several processes: an ordinary exit could wait forever for the others in a collective call.
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        os._exit(1)
    sys.exit(1)


def _sources(argv: Sequence[str], known: list[str]) -> tuple[dict[str, Any], list[tuple[str, list[str]]]]:
    """Return the entries of `--config FILE`, and the other options; refuse unknown keys."""
    options: list[tuple[str, list[str]]] = []
    for word in ("--help" if word == "-h" else word for word in argv):
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            options.append((name, [value] if equals else []))
        elif options:
            options[-1][1].append(word)
        else:
            raise fail("values that belong to no key", where=WHERE, got=word)
    files = [values for name, values in options if name == "config"]
    if [len(values) for values in files] not in ([], [1]):
        raise fail("--config names no file", where="command line", expected="--config FILE.yaml, once")
    options = [option for option in options if option[0] != "config"]
    content, problems = {}, []
    for (file,) in files:
        content = read_yaml(Path(file))
        problems = [unknown_recipe_key(str(key), known, file) for key in content if key not in known]
    keys = [_key_of(name, known) for name, _ in options]
    problems += [unknown_recipe_key(key, known, "command line") for key in keys if key not in [*known, "help"]]
    if problems:
        raise UserError(problems)
    return content, options


def _widen(parser: argparse.ArgumentParser, dataclass_types: Sequence[type]) -> list[str]:
    """Let keys take all that their class does: HfArgumentParser knows one type for each. Return the keys of lists."""
    hints = {name: hint for cls in dataclass_types for name, hint in get_type_hints(cls).items()}
    lists = [name for name, hint in hints.items() if {str, list} <= {get_origin(one) or one for one in get_args(hint)}]
    for action in parser._actions:
        if action.dest in _TRUE_OR_TEXT:
            action.type = _true_or_text
        if action.dest in lists:
            action.nargs = "*"
    return lists


def _unify(values: argparse.Namespace, lists: Sequence[str]) -> None:
    """Make a list of one value that value, words for "no limit" those of today's transformers, and `~` a folder."""
    for key in lists:
        if isinstance(value := getattr(values, key), list) and len(value) == 1:
            setattr(values, key, value[0])
    for key, (theirs, ours) in _OFF.items():
        if getattr(values, key, ours) == theirs:
            setattr(values, key, ours)
    for key in _PATHS:
        if isinstance(value := getattr(values, key, None), str):
            setattr(values, key, os.path.expanduser(value))


def _true_or_text(word: str) -> bool | str:
    return {"true": True, "false": False}.get(word.lower(), word)


def _key_of(name: str, known: list[str]) -> str:
    """Return the key that an option sets; `--no_KEY` sets `KEY`."""
    key = name.replace("-", "_")
    switch = key.removeprefix("no_")
    return switch if key not in known and switch in known else key


def _as_words(key: str, value: Any) -> list[str]:
    """Return a key and its value as words, so one parser checks file and command line."""
    if value is None:
        return []
    if isinstance(value, list):
        return [f"--{key}={value[0]}"] if len(value) == 1 else [f"--{key}", *map(str, value)]
    return [f"--{key}={json.dumps(value) if isinstance(value, (dict, bool)) else value}"]


def _follow_machine(values: argparse.Namespace, given: Collection[str]) -> None:
    """Change keys that nobody set and whose default fails or does nothing on this machine."""
    gpu = torch.cuda.is_available()
    own: dict[str, Any] = {}
    # Older GPUs emulate it, which is slow.
    if not {"bf16", "fp16"} & set(given) and not (gpu and torch.cuda.is_bf16_supported(including_emulation=False)):
        own["bf16"] = False
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # The others wait while the first process measures or samples; by default they would give up after half an hour.
        own["ddp_timeout"] = _PATIENCE_SECONDS
    if not gpu:
        own |= {"use_cpu": True, "dataloader_pin_memory": False}
    if find_spec("tensorboard") is not None:
        own["report_to"] = ["tensorboard"]
    vars(values).update({key: value for key, value in own.items() if key in values and key not in given})
    if getattr(values, "bf16", None) is False and not values.fp16 and os.environ.get(_PRECISION) == "bf16":
        # Or the launch file's precision would win. Its fp16 does: nobody said no to that.
        os.environ[_PRECISION] = "no"


def sharing_size() -> int:
    """Return how many processes share each example: parts of its sequence or of the model's tensors.

    Accelerate's `parallelism_config` says so, as in TRL's `context_parallel_2gpu.yaml`.
    """
    sizes = (os.environ.get(f"PARALLELISM_CONFIG_{kind}_SIZE", "1") for kind in ("TP", "CP", "SP"))
    return math.prod(map(int, sizes))


def _set_accumulation(values: argparse.Namespace, given: Collection[str]) -> None:
    """Set the gradient accumulation that makes the batch of all processes the effective one."""
    effective = getattr(values, "effective_batch_size", None)
    if effective is None:
        return
    where, got = "effective_batch_size", str(effective)
    each, processes = values.per_device_train_batch_size, int(os.environ.get("WORLD_SIZE", "1")) // sharing_size()
    if each is None:
        raise fail("not a batch", where="per_device_train_batch_size", expected="1 or more examples", got="null")
    if min(each, effective) < 1:
        raise fail("not a batch", where=where, expected="1 or more examples", got=got)
    remedy = "change `per_device_train_batch_size`, or leave `gradient_accumulation_steps` out"
    steps, rest = divmod(effective, each * processes)
    if rest or not steps:
        what = "the effective batch cannot be made of whole batches"
        expected = f"a multiple of {each} examples × {processes} processes"
        raise fail(what, where=where, expected=expected, got=got, remedy=remedy)
    stated = values.gradient_accumulation_steps if "gradient_accumulation_steps" in given else None
    if stated not in (None, steps):
        what = "`effective_batch_size` and `gradient_accumulation_steps` contradict each other"
        expected = f"{each} × {stated} × {processes} = {each * stated * processes}"
        raise fail(what, where=where, expected=expected, got=got, remedy=remedy)
    values.gradient_accumulation_steps = steps

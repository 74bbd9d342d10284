"""A recipe's arguments: `--config FILE.yaml`, then overrides on the command line.

The keys are the fields of the recipe's dataclasses: its own and the trainer's. Unknown keys are refused.
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
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from transformers import HfArgumentParser, TrainingArguments
from trl import SFTConfig

from rewarded_lines.errors import Problem, UserError, fail
from rewarded_lines.processes import die_with_parent, termination_as_exit
from rewarded_lines.projects import unknown_key
from rewarded_lines.versions import noted, pip
from rewarded_lines.yaml_files import read_yaml

WHERE = "arguments of the recipe"
_GRACE_SECONDS = 5.0
_PATIENCE_SECONDS = 24 * 3600
# Keys of earlier versions of TRL and transformers, and what to write now.
_EARLIER = {
    "torch_dtype": "write `dtype`",
    "warmup_ratio": "write `warmup_steps`: a number below 1 is the share of all steps",
    "max_prompt_length": "leave it out; `too_long: truncate` shortens prompts that do not fit",
    "rpo_alpha": "write `loss_type: [sigmoid, sft]` and `loss_weights: [1.0, ALPHA]`",
    "group_by_length": "write `train_sampling_strategy: group_by_length`",
    "no_cuda": "write `use_cpu: true`",
    "overwrite_output_dir": "write `overwrite: true`",
    "logging_dir": "leave it out, or set the variable TENSORBOARD_LOGGING_DIR",
    "save_safetensors": "leave it out: weights are always saved as safetensors",
    "reward_funcs": "declare rewards in the project, and name them with `reward` or `rewards`",
    "rloo_k": "write `num_generations`",
    "kl_coef": "write `beta`",
}
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
    fields = [[field.name for field in dataclasses.fields(cls) if field.init] for cls in dataclass_types]
    known = [name for names in fields for name in names]
    content, options = _sources(argv, known)
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
    _follow_machine(values, given)
    _set_accumulation(values, given)
    try:
        made = [
            cls(**{name: getattr(values, name) for name in names})
            for cls, names in zip(dataclass_types, fields, strict=True)
        ]
    except (ValueError, TypeError) as error:
        raise fail(str(error), where=WHERE) from error
    arguments = Arguments(made)
    arguments.given = given
    _check_trackers(arguments)
    _check_trainer(arguments)
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
        problems = [_unknown(str(key), known, file) for key in content if key not in known]
    keys = [_key_of(name, known) for name, _ in options]
    problems += [_unknown(key, known, "command line") for key in keys if key not in [*known, "help"]]
    if problems:
        raise UserError(problems)
    return content, options


def _unknown(key: str, known: list[str], where: str) -> Problem:
    problem = unknown_key(key, known, where)
    return replace(problem, remedy=_EARLIER.get(key, problem.remedy))


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


def _set_accumulation(values: argparse.Namespace, given: Collection[str]) -> None:
    """Set the gradient accumulation that makes the batch of all processes the effective one."""
    effective = getattr(values, "effective_batch_size", None)
    if effective is None:
        return
    where, got = "effective_batch_size", str(effective)
    each, processes = values.per_device_train_batch_size, int(os.environ.get("WORLD_SIZE", "1"))
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


def _check_trainer(arguments: Arguments) -> None:
    """Refuse keys of the trainer that would fail after the first work, or have no effect."""
    faults = []
    for training in (part for part in arguments if isinstance(part, TrainingArguments)):
        for key in ("per_device_train_batch_size", "gradient_accumulation_steps"):
            if (getattr(training, key) or 0) < 1:
                faults.append((f"not a number of examples or steps: {getattr(training, key)}", key, "write 1 or more"))
        if training.push_to_hub:
            remedy = "leave it out; upload the result: rewarded-lines push FOLDER OWNER/NAME"
            faults.append(("recipes upload nothing", "push_to_hub", remedy))
        # Only SFT has a loss on validation rows.
        sft = isinstance(training, SFTConfig)
        if training.eval_strategy != "no" and not (sft and {"validation_file", "dataset_name"} & arguments.given):
            remedy = "name a `validation_file`" if sft else "leave it out: policies are measured after the training"
            faults.append(("no rows to evaluate on while training", "eval_strategy", remedy))
    if "model_init_kwargs" in arguments.given:
        remedy = "write `dtype`, `attn_implementation` and the like"
        faults.append(("without effect: the recipe loads the model", "model_init_kwargs", remedy))
    if faults:
        raise UserError(Problem(what, where=where, remedy=remedy) for what, where, remedy in faults)


def _check_trackers(arguments: Arguments) -> None:
    """Refuse unknown or missing trackers before the long work, not when the trainer is built."""
    from transformers.integrations import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

    present, problems = ["all", "none", *get_available_reporting_integrations()], []
    for name in (name for part in arguments for name in getattr(part, "report_to", None) or []):
        if name not in present and name in INTEGRATION_TO_CALLBACK:
            remedy = noted(pip(f"install {name}"), "or set `report_to: none`")
            problems.append(Problem(f"`{name}` is not installed", where="report_to", remedy=remedy))
        elif name not in present:
            known = ", ".join([*INTEGRATION_TO_CALLBACK, "none"])
            problems.append(Problem(f"unknown tracker `{name}`", where="report_to", expected=f"one of {known}"))
    if problems:
        raise UserError(problems)

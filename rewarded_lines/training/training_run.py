"""A recipe's run: its output is absent, unfinished or complete, and an unfinished one is resumed.

A run works in `NAME.unfinished` beside its output, with checkpoints, metrics and TensorBoard files. At the
end that folder is renamed to `NAME`. Started again with the same config and inputs, the run resumes from its
last whole checkpoint. Folders that no recipe made are never touched.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import TrainingArguments

from rewarded_lines.errors import UserError, fail
from rewarded_lines.folders import TRAINING_FILE, hold_folder, publish_folder, unfinished, write_json
from rewarded_lines.training.arguments import Arguments
from rewarded_lines.training.recipe_options import RunOptions
from rewarded_lines.training.training_record import PROGRESS, differences, last_checkpoint, new_record, read_record

T = TypeVar("T")


class TrainingRun:
    """A run of a recipe, from `training_run`.

    Attributes:
        output: the name that `folder`, which it writes to, gets at the end.
        checkpoint: the last whole checkpoint of an earlier start, to resume from.
        begun: this run made or resumed `folder`.
        trained: the training is done, so `folder` is kept whatever happens.
    """

    def __init__(self, recipe: str, arguments: Arguments, output: Path, overwrite: bool) -> None:
        """Describe the run; refuse folders in the way that hold something else."""
        self.output = output
        self.folder = unfinished(output)
        self.checkpoint: str | None = None
        self.begun = self.trained = False
        self._overwrite = overwrite
        self._only_model = any(getattr(part, "save_only_model", False) for part in arguments)
        self._record = new_record(recipe, arguments, output)
        for folder in (self.output, self.folder):
            self._holds_run(folder)

    def begin(self, **inputs: Any) -> bool:
        """Return whether the run has work to do, and make its folder if so.

        `inputs` are hashes of all that the model is made from; an earlier start must have the same.
        """
        self._record["inputs"] = inputs
        done, self.checkpoint = from_main(self._prepare)
        self.begun = not done
        if done:
            say(f"{self.output} is finished already, with this config and inputs (--overwrite true: again)")
        elif self.checkpoint:
            say(f"going on from {self.checkpoint}")
        if self.begun and (hint := _idle_cores()):
            say(hint)
        return not done

    def keep(self) -> None:
        """Keep the folder from now on, even if the run fails: the training is done."""
        self.trained = True

    def save_model(self, trainer: Any, name: str = "") -> None:
        """Save the trained model, in the folder or in `name` there, whole also where FSDP's checkpoints are sharded."""
        self.keep()
        if trainer.is_fsdp_enabled:
            # With sharded states, FSDP2's default, the trainer would save nothing, and say nothing.
            trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        trainer.save_model(str(self.folder / name))

    def saved(self, **facts: Any) -> None:
        """Record `facts` about the saved model; a run stopped before measuring does not lose it."""
        self.keep()
        self._record |= {**facts, "metrics": {}}
        # The trainer writes a pickle of its arguments; nothing of ours is a pickle.
        from_main(lambda: (self.folder / "training_args.bin").unlink(missing_ok=True))
        from_main(lambda: write_json(self.folder / TRAINING_FILE, {**self._record, "trained": True}))

    def finish(self, measure: Callable[[], Mapping[str, Any]], register: Callable[[], None] = lambda: None) -> None:
        """Measure the saved model, complete the record, rename the folder, register the model.

        `measure` runs in every process, and fails in all or none. If it fails, the rest is done before the error.
        """
        fault: Exception | None = None
        metrics: dict[str, Any] = {}
        try:
            metrics = dict(measure())
        except Exception as error:  # noqa: BLE001 - no error in measuring may lose the model
            # All processes raise a `UserError` of the first; any other error may be this one's alone.
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
                remedy="correct that and measure it by rewarded-lines score or a sweep, without training again",
            ) from fault

    def _prepare(self) -> tuple[bool, str | None]:
        """Return whether the output is complete, and the checkpoint of an unfinished run."""
        complete, unfinished = map(self._holds_run, (self.output, self.folder))
        if self._overwrite:
            if unfinished:
                shutil.rmtree(self.folder)
        elif complete:
            return True, None
        elif unfinished and self._publish_trained():
            return True, None
        checkpoint = last_checkpoint(self.folder)
        if checkpoint and self._only_model:
            # The trainer would begin anew with the optimizer and the learning rate, and say nothing.
            raise fail(
                "an earlier start stopped here, and its checkpoints have no optimizer to go on with",
                where=checkpoint,
                got="save_only_model: true",
                remedy="keep what you need of them, and pass --overwrite true to start again",
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / TRAINING_FILE, self._record)
        return False, checkpoint

    def _publish_trained(self) -> bool:
        """Complete a folder whose model an earlier start saved but did not measure or rename."""
        record = read_record(self.folder) or {}
        if not record.get("complete") and not record.get("trained"):
            return False
        if not record.get("complete"):
            say(f"an earlier start trained {self.folder}, but stopped before measuring it")
        write_json(self.folder / TRAINING_FILE, {**record, "complete": True})
        publish_folder(self.folder, self.output, overwrite=False)
        return True

    def _holds_run(self, folder: Path) -> bool:
        """Return whether a folder holds a run; refuse foreign files and, unless `overwrite`, another run."""
        if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
            return False
        record = read_record(folder)
        if record is None:
            raise fail(
                "the folder holds something that no recipe made",
                where=str(folder),
                expected=f"an output of a recipe, with its {TRAINING_FILE}, or nothing",
                remedy="remove it yourself if you mean to, or pass another --output_dir",
            )
        if not self._overwrite and (found := differences(record, self._record)):
            remedy = "pass --overwrite true to replace it, or another --output_dir"
            raise fail("another run is there", where=str(folder), got="; ".join(found), remedy=remedy)
        return True


@contextmanager
def training_run(recipe: str, arguments: Arguments) -> Iterator[TrainingRun]:
    """Open a run into the trainer's `output_dir`, which is the unfinished folder inside the block.

    Only the first of several processes changes folders. If the block fails, the folder stays only with a
    whole checkpoint or a trained model.
    """
    options = next(part for part in arguments if isinstance(part, RunOptions))
    training = next(part for part in arguments if isinstance(part, TrainingArguments))
    if not training.output_dir or "output_dir" not in arguments.given:
        raise fail("`output_dir` is missing", remedy="set it in the config, or pass --output_dir FOLDER")
    output = Path(training.output_dir)
    if output.name in ("", ".."):
        raise fail("not a name for a new folder", where=str(output), remedy="pass another --output_dir")
    run = TrainingRun(recipe, arguments, output, options.overwrite)
    training.output_dir = str(run.folder)
    # The trainer's configuration sets accelerate's device, so it comes before any use of accelerate.
    _ = training.device
    first = PartialState().is_main_process
    with hold_folder(run.folder) if first else nullcontext():
        try:
            yield run
        finally:
            training.output_dir = str(output)
            done = (read_record(run.folder) or {}).get("complete")
            if first and run.begun and not done and not run.trained and last_checkpoint(run.folder) is None:
                shutil.rmtree(run.folder, ignore_errors=True)


def from_main(compute: Callable[[], T]) -> T:
    """Run `compute` in the first process; return its result, or raise its error, in every one."""
    state = PartialState()
    if state.num_processes == 1:
        return compute()
    box: list[Any] = [None]
    fault: Exception | None = None
    if state.is_main_process:
        try:
            box = [(compute(), None)]
        except Exception as error:  # noqa: BLE001 - the other processes wait for any outcome
            fault = error
            box = [(None, error if isinstance(error, UserError) else fail(f"{type(error).__name__}: {error}"))]
    broadcast_object_list(box)
    value, shared = box[0]
    if shared is not None:
        raise fault or shared
    return value


def say(*lines: str) -> None:
    """Print lines in the first process only."""
    for line in lines if PartialState().is_main_process else ():
        print(line, flush=True)  # noqa: T201 - recipes are scripts and print their progress


def _idle_cores() -> str | None:
    """Return a hint for idle cores: by default `accelerate launch` starts CPU runs on one thread."""
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    # The demo, which watches the progress, divides the cores itself.
    if PROGRESS in os.environ or PartialState().device.type != "cpu" or not torch.get_num_threads() == 1 < cores:
        return None
    return (
        f"this process has 1 thread and {cores} cores: add --num_cpu_threads_per_process {cores} to accelerate launch"
    )

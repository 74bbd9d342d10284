"""What a running recipe tells about itself: one JSON line for each log of the trainer."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rewarded_lines.folders import METRICS_FILE

PROGRESS = "REWARDED_LINES_PROGRESS"


class MetricsCallback(TrainerCallback):
    """Appends `{"step", "max_steps", "seconds", **logs}` to the output folder's metrics.jsonl.

    The output folder has its final name only at the end, so whoever watches names a second file in the
    environment variable REWARDED_LINES_PROGRESS; it gets the same lines. A run that is resumed goes on after the lines
    up to its checkpoint; those that came later are made again.
    """

    def __init__(self, folder: Path) -> None:
        """Write into `folder`, and into the file named by the environment."""
        watched = os.environ.get(PROGRESS)
        self._files = [folder / METRICS_FILE, *([Path(watched)] if watched else [])]
        self._started = time.monotonic()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Say how many steps there will be, and take back the lines of steps that are made again."""
        if state.is_world_process_zero and self._files[0].is_file():
            lines = self._files[0].read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= state.global_step]
            self._files[0].write_text("".join(kept), encoding="utf-8")
        self._write(state, {})

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Append what the trainer logged."""
        self._write(state, logs or {})

    def _write(self, state: TrainerState, logs: dict[str, Any]) -> None:
        if not state.is_world_process_zero:
            return
        line = {
            "step": state.global_step,
            "max_steps": state.max_steps,
            "seconds": round(time.monotonic() - self._started, 3),
            **logs,
        }
        text = json.dumps(line, default=float) + "\n"
        for path in self._files:
            with path.open("a", encoding="utf-8") as file:
                file.write(text)

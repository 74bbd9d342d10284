"""Parts of a long job: which are finished, and the work on the others.

A part is finished if its output exists and its inputs have not changed since. A JSON file of the job keeps the hash of
each part's inputs.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import blake3

from rewarded_lines.folders import json_object_in, write_json
from rewarded_lines.pipelines.recipe_jobs import RecipeJobs, Watch


@dataclass(frozen=True)
class Part:
    """A part of a stage: its output, the hash of its inputs, and what makes it.

    A recipe's `command` comes first, then the function `run`. A part that `resumes` goes on in an existing output;
    others start anew.
    """

    name: str
    output: Path
    made_from: str
    command: tuple[str, ...] = ()
    run: Callable[[Watch], None] | None = None
    resumes: bool = False


class FinishedParts:
    """The finished parts of a job, kept in `file`."""

    def __init__(self, file: Path) -> None:
        """Read nothing yet."""
        self.file = file

    def seconds(self, part: Part) -> float | None:
        """Return how long a finished part took, else None."""
        entry = self._entry(part)
        return float(entry["seconds"]) if entry.get("made_from") == part.made_from and part.output.exists() else None

    def took(self, part: Part) -> float | None:
        """Return how long the part of this name took last, even if it must be made again."""
        return self._entry(part).get("seconds")

    def missing(self, parts: Sequence[Part]) -> list[Part]:
        """Return the parts that are to be made."""
        return [part for part in parts if self.seconds(part) is None]

    def make(self, parts: Sequence[Part], jobs: RecipeJobs, watch: Watch, following: Sequence[Part] = ()) -> None:
        """Make the missing parts side by side, and record each; the recipes of `following` load meanwhile.

        Raises:
            UserError: a recipe failed.
        """
        missing, started = self.missing(parts), time.perf_counter()
        for part in missing:
            # It has other inputs, or was killed before it was recorded.
            if not part.resumes and part.output.is_dir():
                shutil.rmtree(part.output)
        if missing:
            jobs.prepare(_commands(missing))
            jobs.prepare(_commands(self.missing(following)))
        jobs.run(_commands(missing), watch)
        for part in missing:
            if part.run:
                part.run(watch)
            entry = {"made_from": part.made_from, "seconds": round(time.perf_counter() - started, 1)}
            write_json(self.file, {**json_object_in(self.file), part.name: entry})

    def _entry(self, part: Part) -> dict[str, Any]:
        found: dict[str, Any] = json_object_in(self.file).get(part.name, {})
        return found


def digest(content: Any) -> str:
    """Return a hash of content that JSON can hold."""
    return blake3.blake3(json.dumps(content).encode()).hexdigest(length=16)


def _commands(parts: Sequence[Part]) -> dict[str, tuple[str, ...]]:
    """Return the commands of the parts that recipes make."""
    return {part.name: part.command for part in parts if part.command}

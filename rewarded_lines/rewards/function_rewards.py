"""Rewards that a Python function computes, in this process or in several workers. No model is loaded here."""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rewarded_lines.checkpoints.hashing import file_hash
from rewarded_lines.data.prompts import Prompt
from rewarded_lines.references import local_path
from rewarded_lines.rewards.classifier_inputs import as_turns, check_texts, text_of
from rewarded_lines.rewards.function_workers import WorkerPool
from rewarded_lines.rewards.score_checks import ScoreFunction, call_function


class FunctionReward:
    """A reward computed by a Python function `(prompts, responses) -> scores`; see `Reward` for the attributes."""

    size = 0
    device = "cpu"
    loaded = True
    limit = None

    def __init__(
        self,
        name: str,
        unit: str,
        function: ScoreFunction,
        *,
        reference: str = "",
        root: Path = Path(),
        workers: int = 0,
        messages: bool = False,
    ) -> None:
        """Wrap `function`, whose every answer will be checked.

        Args:
            name: the reward's name.
            unit: of its scores.
            function: called with a list of prompts and one of responses.
            reference: `module:name` or `file.py:name`, by which worker processes find the function again.
            root: the folder that a file in `reference` is relative to.
            workers: processes to call it in; 0 is this one.
            messages: call it with the turns of chats, a response as a list of the assistant's one turn.
        """
        self.name = name
        self.unit = unit
        source = _source(function, reference, root)
        self.fingerprint = file_hash(source) if source else ""
        self._function = function
        self._messages = messages
        self._workers = WorkerPool(reference, root, self._where, workers) if workers else None

    @property
    def _where(self) -> str:
        return f"reward `{self.name}`"

    def load(self) -> None:
        """Do nothing: workers start with the first score."""

    def free(self) -> None:
        """End the worker processes; the next score starts others."""
        if self._workers:
            self._workers.close()

    def lengths(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[int]:
        """Return zeros: a function has no limit."""
        return [0] * len(prompts)

    def check(self, prompts: Sequence[Prompt]) -> str:
        """Return what the function will not get of some prompts; see `Reward.check`."""
        return "" if self._messages else check_texts(prompts, self._where, "messages: true")

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        """Return the function's scores; see `Reward.score`.

        Raises:
            UserError: moreover, a worker process that died.
        """
        # Turns of its own: a function may append to them.
        asked: list[Any] = [copy.deepcopy(as_turns(p)) if self._messages else text_of(p, self._where) for p in prompts]
        said: list[Any] = list(responses)
        if self._messages:
            said = [[{"role": "assistant", "content": response}] for response in responses]
        if self._workers:
            return self._workers.score(asked, said)
        return call_function(self._function, self._where, asked, said)


def _source(function: ScoreFunction, reference: str, root: Path) -> Path | None:
    """Return the file that a function stands in; an object that is called is known by the file that made it."""
    if inspect.isroutine(function):
        found = inspect.getsourcefile(inspect.unwrap(function))
        return Path(found) if found else None
    source = reference.rpartition(":")[0]
    if source.endswith(".py"):
        return local_path(source, root)
    found = getattr(sys.modules.get(source), "__file__", None)
    return Path(found) if found else None

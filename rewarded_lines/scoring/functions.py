"""Rewards that a Python function computes, in this process or in several workers. No model is loaded here."""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rewarded_lines.checkpoints.hashing import file_hash
from rewarded_lines.data.prompts import Prompt
from rewarded_lines.errors import Problem, UserError, fail
from rewarded_lines.references import local_path
from rewarded_lines.scoring.checks import PairError, check_count, check_scores
from rewarded_lines.scoring.readings import as_turns, check_texts, text_of
from rewarded_lines.scoring.workers import WorkerPool

# Prompts and responses in, scores out; texts, or with `messages: true` lists of turns.
ScoreFunction = Callable[[Sequence[Any], Sequence[Any]], Sequence[float]]


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


def call_function(function: ScoreFunction, where: str, prompts: Sequence[Any], responses: Sequence[Any]) -> list[float]:
    """Return the checked scores of a function.

    Raises:
        PairError: the function raised, or an answer of it is no finite number; the pair is named.
        UserError: it raised, though not on a pair alone.
    """
    if not prompts:
        return []
    try:
        scores = list(function(list(prompts), list(responses)))
    except Exception as error:  # noqa: BLE001 - a user's function may raise anything; it is reported, not lost
        raise _blame(function, where, prompts, responses, error) from error
    check_count(where, scores, prompts, responses)
    return check_scores(where, scores, prompts, responses)


def _blame(
    function: ScoreFunction, where: str, prompts: Sequence[Any], responses: Sequence[Any], error: Exception
) -> UserError:
    """Name the first pair on which the function raises by itself, or the whole batch when none does.

    What it says of the pairs before that one is kept.
    """
    remedy = "make the function return a float for every response, the empty one included"
    known: dict[int, float] = {}
    for index, pair in enumerate(zip(prompts, responses, strict=True)):
        try:
            alone = list(function([pair[0]], [pair[1]]))
        except Exception as again:  # noqa: BLE001 - looking for the pair that makes it raise
            return PairError(Problem(_raised(again), where=where, remedy=remedy), index, pair, known)
        try:
            check_count(where, alone, [pair[0]], [pair[1]])
            known[index] = check_scores(where, alone, [pair[0]], [pair[1]])[0]
        except PairError:
            continue
    batch = f"a batch of {len(prompts)} prompts, though on none of them alone"
    return fail(_raised(error), where=where, got=batch, remedy=remedy)


def _raised(error: Exception) -> str:
    return f"the function raised {type(error).__name__}: {error}"


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

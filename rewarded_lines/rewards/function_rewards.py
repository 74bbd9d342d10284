"""Rewards from a Python function, called in this process or in worker processes."""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rewarded_lines.checkpoints.hashing import file_hash
from rewarded_lines.data.messages import as_answer, as_turns
from rewarded_lines.data.prompts import Prompt
from rewarded_lines.references import find_function, local_path
from rewarded_lines.reward_settings import RewardSpec
from rewarded_lines.rewards.classifier_inputs import check_texts, text_of
from rewarded_lines.rewards.function_workers import WorkerPool
from rewarded_lines.rewards.reward import Columns, Reward
from rewarded_lines.rewards.score_checks import ScoreFunction, call_function


class FunctionReward(Reward):
    """A Python function `(prompts, responses, **columns) -> scores`."""

    def __init__(self, name: str, spec: RewardSpec, root: Path) -> None:
        """Find the function; files are relative to `root`."""
        self.name, self.unit = name, spec.unit
        self._where = f"reward `{name}`"
        reference = str(spec.function)
        self._function = find_function(reference, root, self._where)
        source = _source(self._function, reference, root)
        self.fingerprint = file_hash(source) if source else ""
        self.columns, self.optional = _columns(self._function)
        self._messages = spec.messages
        self._workers = WorkerPool(reference, root, self._where, spec.workers) if spec.workers else None

    def free(self) -> None:
        """End the worker processes; the next score starts new ones."""
        if self._workers:
            self._workers.close()

    def check(self, prompts: Sequence[Prompt]) -> str:
        """See `Reward.check`."""
        return "" if self._messages else check_texts(prompts, self._where, "messages: true")

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str], columns: Columns = None) -> list[float]:
        """See `Reward.score`."""
        first: list[Any]
        second: list[Any]
        if self._messages:
            # Copies, since a function may append to them.
            first = [copy.deepcopy(as_turns(prompt)) for prompt in prompts]
            second = [as_answer(response) for response in responses]
        else:
            first, second = [text_of(prompt, self._where) for prompt in prompts], list(responses)
        read = [self.reads(row) for row in columns or [{}] * len(first)]
        if self._workers:
            return self._workers.score(first, second, read)
        return call_function(self._function, self._where, first, second, read)


def _columns(function: ScoreFunction) -> tuple[tuple[str, ...], tuple[str, ...] | None]:
    """Return the columns that a function needs, and those that it also takes; None for all."""
    named = list(inspect.signature(function).parameters.values())[2:]
    columns = [one for one in named if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]
    needed = tuple(one.name for one in columns if one.default is one.empty)
    if any(one.kind is one.VAR_KEYWORD for one in named):
        return needed, None
    return needed, tuple(one.name for one in columns if one.default is not one.empty)


def _source(function: ScoreFunction, reference: str, root: Path) -> Path | None:
    """Return the file of a function; for a callable object, the file that `reference` names."""
    if inspect.isroutine(function):
        found = inspect.getsourcefile(inspect.unwrap(function))
        return Path(found) if found else None
    source = reference.rpartition(":")[0]
    if source.endswith(".py"):
        return local_path(source, root)
    found = getattr(sys.modules.get(source), "__file__", None)
    return Path(found) if found else None

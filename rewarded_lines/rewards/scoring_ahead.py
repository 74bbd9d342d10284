"""Scores before they are asked for, in a thread beside the engine that generates the next responses.

The thread only fills the score cache. Who asks later finds the scores there, so records and their order stay the same.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path

from rewarded_lines.data.prompts import Prompt
from rewarded_lines.data.rows import Row
from rewarded_lines.progress import SILENT, Progress
from rewarded_lines.reward_settings import RewardSpec
from rewarded_lines.rewards.reward import Reward
from rewarded_lines.rewards.score_cache import ScoreCache
from rewarded_lines.rewards.scorer import Scorer

Work = tuple[Sequence[Prompt], Sequence[str], Sequence[Row]]
"""Prompts, responses, and the columns of the prompts' rows."""
# Seconds for the thread to end after `stop`. It may wait for a server, and ends with Python at the latest.
_PATIENCE = 2.0


def score_ahead(
    rewards: Mapping[str, Reward], declared: Mapping[str, RewardSpec], cache: Path, progress: Progress = SILENT
) -> ScoringAhead | None:
    """Return a thread for the rewards that can score while an engine generates; None without any.

    `progress` is told its steps while somebody waits for it.

    A reward that may fail is not among them, since its failures are counted point by point. Nor is one whose content
    is unknown, since the cache cannot find its scores again.
    """
    known = {name: one for name, one in rewards.items() if one.beside_engine and one.fingerprint}
    able = {name: one for name, one in known.items() if declared[name].missing != "leave_out"}
    if not able:
        return None
    waited = _WhileWaited(progress)
    return ScoringAhead(Scorer(able, declared, ScoreCache(cache), progress=waited), waited)


class _WhileWaited(Progress):
    """Passes steps on while `shown`: the engine has steps of its own."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self.shown = progress, False

    def start(self, step: str, counted: bool = False) -> None:
        if self.shown:
            self._progress.start(step, counted)


class ScoringAhead:
    """A thread that scores what it is given, all that waits in one call.

    After an error it does no more work: `wait` raises the error.
    """

    def __init__(self, scorer: Scorer, progress: _WhileWaited) -> None:
        """Start no thread yet. The thread alone may let the scorer's rewards compute, until `join`."""
        self._scorer, self._progress = scorer, progress
        self._waiting: deque[Work] = deque()
        self._changed = threading.Condition()
        self._added = self._done = 0
        self._over = False
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None

    @property
    def failed(self) -> bool:
        """Whether a reward has failed."""
        return self._error is not None

    @property
    def added(self) -> int:
        """How much work has been added so far: the number for `wait`."""
        return self._added

    def add(self, work: Work) -> None:
        """Score these, too."""
        with self._changed:
            self._waiting.append(work)
            self._added += 1
            self._changed.notify_all()
        if self._thread is None:
            # A daemon: Python's exit does not wait for an answer of a server.
            self._thread = threading.Thread(target=self._run, name="scoring ahead", daemon=True)
            self._thread.start()

    def wait(self, number: int) -> None:
        """Return once the first `number` of what was added is scored; raise what a reward failed with there."""
        self._progress.shown = True
        try:
            with self._changed:
                self._changed.wait_for(lambda: self._error or self._done >= number)
        finally:
            self._progress.shown = False
        if self._error and self._done < number:
            raise self._error

    def stop(self) -> None:
        """Forget what waits. A call that runs goes on until it ends, or until the rewards are freed."""
        with self._changed:
            self._over = True
            self._waiting.clear()
            self._changed.notify_all()

    def join(self) -> None:
        """Wait a moment for the thread to end, after `stop`, and close its cache."""
        if self._thread:
            self._thread.join(_PATIENCE)
        if not (self._thread and self._thread.is_alive()):
            self._scorer.close()

    def _run(self) -> None:
        while some := self._next():
            try:
                prompts, responses, columns = (list(chain.from_iterable(part)) for part in zip(*some, strict=True))
                self._scorer.score(prompts, responses, columns)
            except BaseException as error:  # noqa: BLE001 - `wait` raises it in the caller's thread
                self._error = error
            with self._changed:
                self._done += 0 if self._error else len(some)
                self._changed.notify_all()

    def _next(self) -> list[Work]:
        """Wait for work; return all of it, or nothing when it is over."""
        with self._changed:
            self._changed.wait_for(lambda: self._over or self._waiting)
            some = [] if self._over or self._error else list(self._waiting)
            self._waiting.clear()
            return some

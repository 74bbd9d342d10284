"""Worker processes that call a reward's function, and their ends: none of them outlives this process or a Ctrl-C."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from rewarded_lines.errors import Problem, UserError, fail
from rewarded_lines.processes import DIE_WITH_PARENT, die_with_parent
from rewarded_lines.references import find_function
from rewarded_lines.rewards.score_checks import PairError, call_function

Answer = list[float] | tuple[Problem, ...]
_SLICES = 4
"""Parts of a call for each worker, so that one with the slow pairs does not keep the others waiting."""


class WorkerPool:
    """Processes in which the function of a reference is called, started with the first score."""

    def __init__(self, reference: str, root: Path, where: str, workers: int) -> None:
        """Start nothing yet.

        Args:
            reference: `module:name` or `file.py:name`.
            root: the folder that a file in `reference` is relative to.
            where: the reward, for messages.
            workers: the number of processes.
        """
        # A worker starts in another folder when this process changes its own.
        self._task = (reference, root.resolve(), where)
        self._workers = workers
        self._executor: ProcessPoolExecutor | None = None

    def score(self, prompts: Sequence[Any], responses: Sequence[Any]) -> list[float]:
        """Return the function's scores in the order of the pairs.

        Raises:
            PairError: the function failed on a pair; of several, the first.
            UserError: it failed without one, or a worker process died.
        """
        size = max(1, math.ceil(len(prompts) / (self._workers * _SLICES)))
        starts = range(0, len(prompts), size)
        try:
            executor = self._start()
            futures = [
                executor.submit(_score, *self._task, list(prompts[i : i + size]), list(responses[i : i + size]))
                for i in starts
            ]
            return _gather(starts, futures)
        except BrokenProcessPool as error:
            self.close()
            raise self._died() from error
        except UserError:
            raise
        except BaseException:
            # Ctrl-C, say: nobody will wait for what the workers are at.
            self.close()
            raise

    def close(self) -> None:
        """End the processes, whatever they are at."""
        executor, self._executor = self._executor, None
        if executor is None:
            return
        # `shutdown` waits for a function that is running, and forgets its processes; only they can be ended.
        processes = list((executor._processes or {}).values())
        executor.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.kill()
        for process in processes:
            process.join()

    def _start(self) -> ProcessPoolExecutor:
        if self._executor is None:
            # Not forked: threads of torch and tokenizers would leave their locks held in the child.
            self._executor = ProcessPoolExecutor(
                self._workers, multiprocessing.get_context("spawn"), _begin, (os.getpid(),)
            )
        return self._executor

    def _died(self) -> UserError:
        return fail(
            "a worker process died while the function was called in it",
            where=self._task[2],
            got=self._task[0],
            remedy="look for an exit, a crash or want of memory in the function; without `workers:` it runs in this "
            'process (a script that scores with workers needs `if __name__ == "__main__":`)',
        )


def _gather(starts: Sequence[int], futures: Sequence[Future[Answer]]) -> list[float]:
    """Return the scores of all slices; a failure is the first one's, and keeps what the other slices gave."""
    scores: list[float] = []
    known: dict[int, float] = {}
    failure: UserError | None = None
    for start, future in zip(starts, futures, strict=True):
        try:
            part = future.result()
        except PairError as error:
            moved = error.shifted(start)
            known |= moved.known
            failure = failure or moved
            continue
        if isinstance(part, tuple):
            failure = failure or UserError(part)
            continue
        known |= {start + index: score for index, score in enumerate(part)}
        scores += part
    if isinstance(failure, PairError):
        failure.known.update(known)
    if failure is not None:
        raise failure
    return scores


def _begin(parent: int) -> None:
    """Be a worker: Ctrl-C is the parent's to handle, its end is ours."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ[DIE_WITH_PARENT] = str(parent)
    with suppress(OSError):
        die_with_parent()


@cache
def _function(reference: str, root: Path, where: str) -> Any:
    return find_function(reference, root, where)


def _score(reference: str, root: Path, where: str, prompts: list[Any], responses: list[Any]) -> Answer:
    """Return the scores of a slice, or the problems of a failure that is no `PairError`: that one cannot travel."""
    try:
        return call_function(_function(reference, root, where), where, prompts, responses)
    except PairError:
        raise
    except UserError as error:
        return error.problems

"""Worker processes that call a reward's function. No worker outlives this process or Ctrl-C."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from rewarded_lines.data.rows import Row
from rewarded_lines.errors import UserError, fail
from rewarded_lines.processes import DIE_WITH_PARENT, die_with_parent
from rewarded_lines.rewards.score_checks import PairError, call_function
from rewarded_lines.rewards.user_functions import UserFunction, load_function

# Slices of a call for each worker, so that a worker with slow pairs does not delay the others.
_SLICES = 4
# What `load_function` takes: reference, root, the reward for messages, options, whether there are tokens.
Task = tuple[str, Path, str, Mapping[str, Any], bool]


class WorkerPool:
    """Processes that call one function; they start with the first score."""

    def __init__(self, task: Task, workers: int) -> None:
        """Start nothing yet. The root is absolute: this process may change its folder before the workers start."""
        # As JSON, so that a worker can keep what it loads for a task.
        self._task = (*task[:3], json.dumps(task[3]), task[4])
        self._workers = workers
        self._executor: ProcessPoolExecutor | None = None

    def score(self, prompts: Sequence[Any], responses: Sequence[Any], columns: Sequence[Row]) -> list[float]:
        """Return the function's scores in the order of the pairs, or raise the first failure."""
        size = max(1, math.ceil(len(prompts) / (self._workers * _SLICES)))
        starts = range(0, len(prompts), size)
        try:
            if self._executor is None:
                # Not forked: a child would inherit locks that threads of torch and tokenizers hold.
                spawn = multiprocessing.get_context("spawn")
                self._executor = ProcessPoolExecutor(self._workers, spawn, _begin, (os.getpid(),))
            parts = [[list(part[i : i + size]) for part in (prompts, responses, columns)] for i in starts]
            futures = [self._executor.submit(_score, *self._task, *part) for part in parts]
            return _gather(starts, futures)
        except BrokenProcessPool as error:
            self.close()
            raise fail(
                "a worker process died while the function was called in it",
                where=self._task[2],
                got=self._task[0],
                remedy="look for an exit, a crash or too little memory in the function; without `workers:` it runs in "
                'this process (a script that scores with workers needs `if __name__ == "__main__":`)',
            ) from error
        except UserError:
            raise
        except BaseException:
            # Ctrl-C, for instance: nobody needs the running calls any more.
            self.close()
            raise

    def close(self) -> None:
        """Kill the processes, even in the middle of a call."""
        executor, self._executor = self._executor, None
        if executor is None:
            return
        # `shutdown` forgets the processes and does not end running calls.
        processes = list((executor._processes or {}).values())
        executor.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.kill()
        for process in processes:
            process.join()


def _gather(starts: Sequence[int], futures: Sequence[Future[list[float]]]) -> list[float]:
    """Return the scores of all slices, or raise the first failure with all scores that are known."""
    known: dict[int, float] = {}
    failure: UserError | None = None
    for start, future in zip(starts, futures, strict=True):
        try:
            known |= {start + at: score for at, score in enumerate(future.result())}
        except PairError as error:
            known |= {start + at: score for at, score in error.known.items()}
            failure = failure or PairError(error.problem, start + error.index, error.pair, known)
        except UserError as error:
            failure = failure or error
    if failure is None:
        return [known[at] for at in sorted(known)]
    if isinstance(failure, PairError):
        failure.known = known
    raise failure


def _begin(parent: int) -> None:
    """Set up a worker: it ignores Ctrl-C, and ends with its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ[DIE_WITH_PARENT] = str(parent)
    with suppress(OSError):
        die_with_parent()


def _score(reference: str, root: Path, where: str, options: str, tokens: bool, *parts: Any) -> list[float]:
    return call_function(_load(reference, root, where, options, tokens), where, *parts)


@cache
def _load(reference: str, root: Path, where: str, options: str, tokens: bool) -> UserFunction:
    return load_function(reference, root, where, json.loads(options), tokens)

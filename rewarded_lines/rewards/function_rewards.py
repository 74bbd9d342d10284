"""Rewards from a Python function, called in this process or in worker processes.

No worker outlives this process or Ctrl-C.
"""

from __future__ import annotations

import copy
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

import blake3

from rewarded_lines.data.messages import as_answer, as_turns
from rewarded_lines.data.prompts import Prompt, prompt_text
from rewarded_lines.data.rows import Row
from rewarded_lines.errors import UserError, fail
from rewarded_lines.processes import DIE_WITH_PARENT, die_with_parent
from rewarded_lines.references import local_path, looks_local
from rewarded_lines.reward_settings import RewardSpec
from rewarded_lines.rewards.classifier_inputs import check_texts, text_of
from rewarded_lines.rewards.reward import Columns, Reward
from rewarded_lines.rewards.score_checks import PairError, call_function
from rewarded_lines.rewards.user_functions import TOKENS, UserFunction, load_function

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


class FunctionReward(Reward):
    """A Python function `(prompts, responses, **columns) -> scores`, or one for TRL; see `UserFunction`."""

    def __init__(self, name: str, spec: RewardSpec, root: Path) -> None:
        """Find the function; files are relative to `root`."""
        self.name, self.unit = name, spec.unit
        self._where = f"reward `{name}`"
        task = (str(spec.function), root.resolve(), self._where, spec.options, spec.tokenizer is not None)
        self._function = load_function(*task)
        self.columns, self.optional = self._function.columns, self._function.optional
        self._messages = spec.messages
        # As TRL: turns for chats, texts for texts.
        self._as_trl = spec.messages is None and self._function.is_trls
        self._tokenizer = self._load_tokenizer(str(spec.tokenizer), root) if spec.tokenizer is not None else None
        self.fingerprint = self._fingerprint()
        self._workers = WorkerPool(task, spec.workers) if spec.workers else None
        # Called in this process, it may need the main thread: signals and connections to databases do.
        self.beside_engine = self._workers is not None

    def free(self) -> None:
        """End the worker processes; the next score starts new ones."""
        if self._workers:
            self._workers.close()

    def column_remedy(self, name: str) -> str:
        """See `Reward.column_remedy`; a parameter may also be an option."""
        return f"{super().column_remedy(name)}, or give one value for all rows: `options: {{{name}: VALUE}}`"

    def check(self, prompts: Sequence[Prompt]) -> str:
        """See `Reward.check`."""
        whole = self._messages or self._as_trl or not self._function.reads_prompts
        return "" if whole else check_texts(prompts, self._where, "messages: true")

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str], columns: Columns = None) -> list[float]:
        """See `Reward.score`."""
        turns = [bool(self._messages) or (self._as_trl and isinstance(prompt, list)) for prompt in prompts]
        first = [self._read(prompt, chat) for prompt, chat in zip(prompts, turns, strict=True)]
        second = [as_answer(one) if chat else one for one, chat in zip(responses, turns, strict=True)]
        read = [self.reads(row) for row in columns or [{}] * len(first)]
        if self._tokenizer and responses:
            tokens = self._tokenizer(list(responses), add_special_tokens=False)["input_ids"]
            read = [{**row, TOKENS: ids} for row, ids in zip(read, tokens, strict=True)]
        if self._workers:
            return self._workers.score(first, second, read)
        return call_function(self._function, self._where, first, second, read)

    def _read(self, prompt: Prompt, turns: bool) -> Prompt:
        """Return a prompt as the function gets it: as turns, or as text, which must tell all of a chat."""
        if turns:
            # A copy, since a function may append to it.
            return copy.deepcopy(as_turns(prompt))
        return text_of(prompt, self._where) if self._function.reads_prompts else prompt_text(prompt)

    def _load_tokenizer(self, reference: str, root: Path) -> Any:
        """Return the tokenizer that makes `completion_ids`."""
        if TOKENS in self._function.hidden:
            raise fail(f"the function takes no `{TOKENS}`", where=self._where, remedy="remove `tokenizer:`")
        from transformers import AutoTokenizer

        path = str(local_path(reference, root)) if looks_local(reference, root) else reference
        try:
            return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise fail("the tokenizer cannot be loaded", where=self._where, got=f"{path}: {error}") from error

    def _fingerprint(self) -> str:
        """Return the function's, with the tokenizer's; one that now reads chats as TRL does gets a new one."""
        known = self._function.fingerprint
        parts = [known, *(["turns"] if self._as_trl else [])]
        if self._tokenizer:
            parts.append(_content(self._tokenizer))
        return blake3.blake3("\n".join(parts).encode()).hexdigest() if known and parts[1:] else known


def _content(tokenizer: Any) -> str:
    """Return all that decides the tokens of a text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend.to_str() if backend else json.dumps(tokenizer.get_vocab(), sort_keys=True)

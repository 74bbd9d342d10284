"""Every answer of a reward is checked here; a wrong one becomes an error that names the pair."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from rewarded_lines.errors import Problem, UserError, fail

Pair = tuple[Any, Any]
"""A prompt, a text or turns, and a response to it."""
ScoreFunction = Callable[[Sequence[Any], Sequence[Any]], Sequence[float]]
"""Prompts and responses in, scores out: texts, or lists of turns with `messages: true`."""
_CHECK_RESPONSES = "return a finite float for every response, the empty one included"


class PairError(UserError):
    """A reward that failed on one pair of a call.

    Attributes:
        index: the pair's place in the call.
        pair: its prompt and response.
        known: what was scored all the same, by place in the call.
    """

    def __init__(self, problem: Problem, index: int, pair: Pair, known: Mapping[int, float] | None = None) -> None:
        """Say `problem` of a pair.

        Args:
            problem: its `got` is what was got, without the pair, which is added.
            index: the pair's place in the call.
            pair: its prompt and response.
            known: scores that can be kept, by place in the call.
        """
        self._problem, self.index, self.pair, self.known = problem, index, pair, dict(known or {})
        place = f"prompt {index}: {pair[0]!r} → {pair[1]!r}"
        super().__init__(replace(problem, got=f"{problem.got} {place}" if problem.got else place))

    def at(self, index: int) -> PairError:
        """Return the error as one of a larger call, in which the pair has the place `index`."""
        return PairError(self._problem, index, self.pair, self.known)

    def shifted(self, start: int) -> PairError:
        """Return the error of a slice as that of the call whose pairs from the `start`-th on it was."""
        known = {start + index: score for index, score in self.known.items()}
        return PairError(self._problem, start + self.index, self.pair, known)

    def __reduce__(self) -> tuple[Any, ...]:
        """Let the error travel from a worker process."""
        return PairError, (self._problem, self.index, self.pair, self.known)


def check_count(where: str, scores: Sequence[Any], prompts: Sequence[Any], responses: Sequence[Any]) -> None:
    """Refuse fewer or more scores than pairs.

    Raises:
        PairError: naming the first pair without a score of its own.
    """
    if len(scores) == len(prompts):
        return
    index = min(len(scores), len(prompts) - 1)
    problem = Problem(
        "the function returned the wrong number of scores",
        where=where,
        expected=f"{len(prompts)}, one for each prompt",
        got=f"{len(scores)}, so the first prompt without a score of its own is",
        remedy="return a list with one float for each (prompt, response) pair",
    )
    raise PairError(problem, index, (prompts[index], responses[index]))


def check_scores(where: str, scores: Sequence[Any], prompts: Sequence[Any], responses: Sequence[Any]) -> list[float]:
    """Return `scores` as floats.

    Raises:
        PairError: naming the first pair whose score is not a finite number.
    """
    checked = [_as_float(score) for score in scores]
    finite = {index: score for index, score in enumerate(checked) if math.isfinite(score)}
    if len(finite) == len(checked):
        return checked
    index = next(index for index in range(len(checked)) if index not in finite)
    problem = Problem(
        "a score is not a finite number",
        where=where,
        expected="a float",
        got=f"{scores[index]!r} for",
        remedy=_CHECK_RESPONSES,
    )
    raise PairError(problem, index, (prompts[index], responses[index]), finite)


def _as_float(score: Any) -> float:
    try:
        return float(score)
    except (TypeError, ValueError, OverflowError):
        return math.nan


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

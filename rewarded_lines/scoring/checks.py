"""What every reward's answer must be, and the error that names the pair on which it was not. Nothing here scores."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from rewarded_lines.errors import Problem, UserError

Pair = tuple[Any, Any]
"""A prompt, a text or turns, and a response to it."""
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

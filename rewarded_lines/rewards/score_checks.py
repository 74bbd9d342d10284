"""Checks every reward's scores. An error names the pair that caused it."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import replace
from typing import Any

from rewarded_lines.data.prompts import Prompt
from rewarded_lines.data.rows import Row
from rewarded_lines.errors import Problem, UserError, fail, listed

_BRIEF = 300
_MOST_REASONS, _MOST_ROWS, _SHOWN = 3, 4, 40
# A prompt (a text or turns) and a response to it; of a reward that reads columns, also these or their JSON.
Pair = tuple[Any, ...]
# Takes prompts and responses (texts, or turns with `messages: true`) and columns by name, returns scores.
ScoreFunction = Callable[..., Sequence[float | None]]
_REMEDY = "return a finite float for every response, the empty one included, or None where the reward has no say"


class PairError(UserError):
    """A reward failed on one pair of a call.

    Attributes:
        problem: without the pair, which the message adds.
        index: the pair's place in the call.
        pair: its prompt and response.
        known: the scores that the reward gave all the same, by place in the call.
    """

    def __init__(self, problem: Problem, index: int, pair: Pair, known: Mapping[int, float] | None = None) -> None:
        """Add the pair to the problem's `got`."""
        self.problem, self.index, self.pair, self.known = problem, index, pair, dict(known or {})
        columns = f", columns {pair[2]!r:.{_BRIEF}}" if pair[2:] and pair[2] else ""
        place = f"prompt {index}: {pair[0]!r} → {pair[1]!r}{columns}"
        super().__init__(replace(problem, got=f"{problem.got} {place}" if problem.got else place))

    def __reduce__(self) -> tuple[Any, ...]:
        """Make the error picklable for worker processes."""
        return PairError, (self.problem, self.index, self.pair, self.known)


def rows_failed(
    name: str,
    failed: Mapping[int, Problem],
    prompts: Sequence[Prompt],
    responses: Sequence[str],
    remedy: str = "mend what the server says; a training needs every score, `missing: leave_out` is for sweeps",
) -> UserError:
    """Return the error for a reward without scores for some of the pairs; `failed` tells why, by their places."""
    rows: dict[str, list[str]] = defaultdict(list)
    for at, one in sorted(failed.items()):
        why = f"{one.what}: {one.got.removesuffix(' for')}" if one.got else one.what
        rows[why].append(f"prompt {at}: {_short(prompts[at])} → {_short(responses[at])}")
    return fail(
        f"no score for {len(failed):,} of {len(prompts):,} responses, after all attempts",
        where=next(iter(failed.values())).where or f"reward `{name}`",
        expected="a score for each, or null where the reward has no say",
        got=listed([f"{why} ({listed(some, _MOST_ROWS)})" for why, some in rows.items()], _MOST_REASONS),
        remedy=next((one.remedy for one in failed.values() if one.remedy), remedy),
    )


def _short(text: Any) -> str:
    shown = repr(text)
    return shown if len(shown) <= _SHOWN else f"{shown[: _SHOWN - 1]}…"


def check_lengths(
    where: str, reader: str, lengths: Sequence[int], limit: int | None, origin: str, pairs: Sequence[Pair]
) -> None:
    """Refuse a text over the limit of its reader: a cut would remove the response."""
    longest = max(lengths, default=0)
    if limit is not None and longest > limit:
        problem = Problem(
            f"a text is too long for {reader}",
            where=where,
            expected=f"at most {limit} tokens, {origin}",
            got=f"{longest} tokens for",
            remedy="raise `max_tokens` if the model can read more, or shorten prompts or responses",
        )
        index = lengths.index(longest)
        raise PairError(problem, index, pairs[index])


def check_scores(
    where: str, scores: Sequence[Any], prompts: Sequence[Any], responses: Sequence[Any], *columns: Sequence[Row]
) -> list[float]:
    """Return a float for each pair, NaN for None, or raise a `PairError`; other scores must be finite."""
    pairs = [prompts, responses, *columns]
    if len(scores) != len(prompts):
        index = min(len(scores), len(prompts) - 1)
        problem = Problem(
            "the function returned the wrong number of scores",
            where=where,
            expected=f"{len(prompts)}, one for each prompt",
            got=f"{len(scores)}, so the first prompt without a score of its own is",
            remedy="return a list with one float for each (prompt, response) pair",
        )
        raise PairError(problem, index, tuple(part[index] for part in pairs))
    checked = [_as_float(score) for score in scores]
    finite = {index: score for index, score in enumerate(checked) if math.isfinite(score) or scores[index] is None}
    if len(finite) == len(checked):
        return checked
    index = next(index for index in range(len(checked)) if index not in finite)
    what, got = "a score is not a finite number", f"{scores[index]!r} for"
    problem = Problem(what, where=where, expected="a float", got=got, remedy=_REMEDY)
    raise PairError(problem, index, tuple(part[index] for part in pairs), finite)


def call_function(
    function: ScoreFunction, where: str, prompts: Sequence[Any], responses: Sequence[Any], columns: Sequence[Row]
) -> list[float]:
    """Return the checked scores of a function; find the pair on which it raises.

    The function gets each column of `columns`, the rows of the pairs, as a list; None where a row lacks it.
    """
    if not prompts:
        return []
    try:
        scores = _call(function, prompts, responses, columns)
    except _NoScores as error:
        raise fail(
            f"the function returned {error}", where=where, expected="a list of scores", remedy=_REMEDY
        ) from error
    except Exception as error:  # noqa: BLE001 - a user's function may raise anything
        raise _find_pair(function, where, prompts, responses, columns, error) from error
    return check_scores(where, scores, prompts, responses, columns)


class _NoScores(Exception):
    """What a function returned is no list of scores."""


def _call(
    function: ScoreFunction, prompts: Sequence[Any], responses: Sequence[Any], columns: Sequence[Row]
) -> list[Any]:
    names = dict.fromkeys(name for row in columns for name in row)
    # Copies, since a function may change lists and mappings.
    given = {name: [copy.deepcopy(row.get(name)) for row in columns] for name in names}
    returned: Any = function(list(prompts), list(responses), **given)
    # A mapping's or a text's elements are no scores, and a set has no order.
    if isinstance(returned, (str, bytes, Mapping, Set)) or not isinstance(returned, Iterable):
        raise _NoScores("None" if returned is None else f"a {type(returned).__name__}")
    return list(returned)


def _find_pair(
    function: ScoreFunction,
    where: str,
    prompts: Sequence[Any],
    responses: Sequence[Any],
    columns: Sequence[Row],
    error: Exception,
) -> UserError:
    """Return an error with the first pair that raises alone, and the scores before it."""
    known: dict[int, float] = {}
    for index, (prompt, response, row) in enumerate(zip(prompts, responses, columns, strict=True)):
        try:
            alone = _call(function, [prompt], [response], [row])
        except Exception as again:  # noqa: BLE001 - likewise
            return PairError(
                Problem(_raised(again), where=where, remedy=_REMEDY), index, (prompt, response, row), known
            )
        try:
            known[index] = check_scores(where, alone, [prompt], [response])[0]
        except PairError:
            continue
    batch = f"a batch of {len(prompts)} prompts, though on none of them alone"
    return fail(_raised(error), where=where, got=batch, remedy=_REMEDY)


def _raised(error: Exception) -> str:
    return f"the function raised {type(error).__name__}: {error}"


def _as_float(score: Any) -> float:
    if isinstance(score, (str, bytes)):
        return math.nan
    try:
        return float(score)
    except (TypeError, ValueError, OverflowError):
        return math.nan

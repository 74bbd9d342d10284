"""What a judge's verdict is worth: shares of its next token, or what a pattern finds in its answer."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence

from rewarded_lines.errors import Problem, listed
from rewarded_lines.reward_settings import RewardSpec
from rewarded_lines.rewards.judge_questions import Answer, NextToken

# With less of the next token than this, the shares of `tokens:` are shares of noise.
_LEAST = 0.01
_SHOWN = 160


def verdict_texts(spec: RewardSpec) -> tuple[str, ...]:
    """Return the texts that a declaration asks for as the next token; none if the judge writes its verdict."""
    return spec.token or tuple(spec.tokens)


def of_next_token(found: NextToken, spec: RewardSpec, where: str) -> float | Problem:
    """Return the score of a verdict in one token, or why there is none.

    Σ P(text) for `token:`; Σ value·P(text) / Σ P(text) for `tokens:`.
    """
    texts, total = verdict_texts(spec), math.fsum(found.shares)
    alike = {text.strip().casefold() for text in texts}
    if found.other and found.other.strip().casefold() in alike:
        return Problem(
            "the judge's likeliest token is another spelling",
            where=where,
            expected=listed([repr(text) for text in texts], len(texts)),
            got=f"{found.other!r} for",
            remedy=_with_spelling(spec, found.other),
        )
    if spec.token:
        return total
    if total < _LEAST:
        return Problem(
            "the judge answers with another token",
            where=where,
            expected=f"{listed([repr(text) for text in texts], len(texts))}, together at least {_LEAST:.0%} likely",
            got=f"{total:.2g}; the likeliest is {found.other!r}, for",
            remedy="name what it answers with, begin its answer with `prefill:`, or set `unmatched: abstain`",
        )
    return math.fsum(spec.tokens[text] * share for text, share in zip(texts, found.shares, strict=True)) / total


def _with_spelling(spec: RewardSpec, other: str) -> str:
    """Return the line that also counts another spelling of a text, with the text's value."""
    if spec.token:
        return f"write `token: {json.dumps([*spec.token, other], ensure_ascii=False)}`"
    alike = next(text for text in spec.tokens if text.strip().casefold() == other.strip().casefold())
    values = {**spec.tokens, other: spec.tokens[alike]}
    return f"write `tokens: {json.dumps(values, ensure_ascii=False)}`"


def of_answer(found: Answer, spec: RewardSpec, where: str) -> float | Problem:
    """Return the score that the pattern finds in an answer, or why there is none."""
    text = spec.prefill + found.text
    matches = list(re.finditer(str(spec.pattern), text))
    if not found.ended and (spec.match == "last" or (matches and matches[0].end() == len(text))):
        return _no_verdict(
            "the judge's answer was cut before its end",
            where,
            text,
            "an answer that ends",
            "raise `max_new_tokens:`" + (", or set `match: first`" if spec.match == "last" else ""),
        )
    if not matches:
        remedy = "correct `pattern:` or the template, raise `max_new_tokens:`, or set `unmatched: abstain`"
        return _no_verdict("the judge's answer has no verdict", where, text, f"a match of {spec.pattern!r}", remedy)
    verdict = _captured(matches[-1 if spec.match == "last" else 0])
    if spec.verdicts:
        if verdict in spec.verdicts:
            return spec.verdicts[verdict]
        known = f"one of {', '.join(map(repr, spec.verdicts))}"
        return _no_verdict(f"no value for the verdict {verdict!r}", where, text, known, "add it to `verdicts:`")
    try:
        number = float(verdict)
    except ValueError:
        number = math.nan
    if math.isfinite(number):
        return number
    remedy = "let the group of `pattern:` hold a number, or give texts their values with `verdicts:`"
    return _no_verdict(f"the verdict {verdict!r} is not a number", where, text, "a number", remedy)


def win_share(shares: Sequence[float]) -> float:
    """Return a response's share of wins: the mean of both orders.

    Args:
        shares: of the answer shown first, with the response first and with the reference first.
    """
    first, second = shares
    return (first + (1 - second)) / 2


def _captured(match: re.Match[str]) -> str:
    """Return the text of the group, or of the whole match without one; blanks around it do not count."""
    return (match[match.re.groups] or "").strip()


def _no_verdict(what: str, where: str, text: str, expected: str, remedy: str) -> Problem:
    shown = text if len(text) <= _SHOWN else "…" + text[-_SHOWN:]
    return Problem(what, where=where, expected=expected, got=f"{shown!r} for", remedy=remedy)

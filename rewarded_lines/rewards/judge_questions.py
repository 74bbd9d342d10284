"""What a judge is asked, and what its verdict is worth: shares of its next token, or what a pattern finds.

A question holds one response, or two to compare. Texts are filled in without reading braces inside them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import blake3

from rewarded_lines.config_values import CHAT
from rewarded_lines.data.messages import as_turns, is_chat, read_messages
from rewarded_lines.data.prompts import Prompt, prompt_text
from rewarded_lines.data.rows import Row
from rewarded_lines.errors import Problem, fail, listed
from rewarded_lines.judge_settings import PLACE, SFT_MODEL, judge_columns
from rewarded_lines.reward_settings import RewardSpec
from rewarded_lines.rewards.classifier_inputs import text_of
from rewarded_lines.rewards.reward import SFT_RESPONSE


@dataclass(frozen=True)
class Question:
    """One question to a judge.

    Attributes:
        prompt: turns for the judge's chat template, or a text that it continues.
        prefill: the beginning of the judge's answer; it goes on from there.
    """

    prompt: Prompt
    prefill: str = ""


@dataclass(frozen=True)
class Answer:
    """What a judge wrote after the prefill, without special tokens; `ended` is false if it was cut."""

    text: str
    ended: bool


@dataclass(frozen=True)
class NextToken:
    """The judge's next token, at temperature 1.

    Attributes:
        shares: the probability of each text that was asked for, in order.
        other: the likeliest token as text if it is none of them, else "".
    """

    shares: tuple[float, ...]
    other: str = ""


@dataclass(frozen=True)
class QuestionForm:
    """Makes questions from prompts, responses and the columns of their rows, as a declaration says."""

    spec: RewardSpec
    where: str

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that a row must have."""
        against = self.spec.against
        own = judge_columns(self.spec.template, against)
        return tuple(dict.fromkeys(own if against in (None, SFT_MODEL) else [*own, str(against)]))

    def ask(self, prompt: Prompt, response: str, row: Row) -> list[Question]:
        """Return the question on a response; against a reference, the one of both orders.

        In the second question the reference is the first answer.
        """
        if self.spec.template == CHAT:
            turns = [*as_turns(prompt), {"role": "assistant", "content": response}]
            return [self._question(turns)]
        values = {name: self._text(row, name) for name in judge_columns(self.spec.template, self.spec.against)}
        values["prompt"] = text_of(prompt, self.where)
        if self.spec.against is None:
            return [self._question(self._filled({**values, "response": response}))]
        pair = response, self.reference(row)
        return [self._question(self._filled({**values, **_named(one)})) for one in (pair, pair[::-1])]

    def reference(self, row: Row) -> str:
        """Return the answer of a row to compare with; of a chat, its last turn's text."""
        name = SFT_RESPONSE if self.spec.against == SFT_MODEL else str(self.spec.against)
        value = row.get(name)
        if is_chat(value):
            value = read_messages(value, f"{self.where}, against: {self.spec.against}")[-1]["content"]
        if not isinstance(value, str):
            raise fail(
                "a row has no answer to compare with",
                where=f"{self.where}, against: {self.spec.against}",
                expected="a text, or a chat that ends with it",
                got=repr(value)[:80],
            )
        return value

    def texts(self, row: Row) -> list[str]:
        """Return the texts of the columns that go into a row's questions."""
        own = [self._text(row, name) for name in judge_columns(self.spec.template, self.spec.against)]
        return own if self.spec.against in (None, SFT_MODEL) else [*own, self.reference(row)]

    def _text(self, row: Row, name: str) -> str:
        value = row.get(name)
        if value is None:
            raise fail(
                f"column `{name}` is missing or empty",
                where=f"{self.where}, template",
                expected="a value to put into the template",
                remedy="fill it, or leave the row out with a row function",
            )
        if is_chat(value):
            return prompt_text(read_messages(value, f"{self.where}, column `{name}`"))
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)

    def _filled(self, values: Mapping[str, str]) -> str:
        def replace(found: re.Match[str]) -> str:
            return f"{{{found[1]}}}" if found[1] else values[found[2]]

        return PLACE.sub(replace, str(self.spec.template))

    def _question(self, content: Prompt) -> Question:
        if self.spec.plain:
            return Question(content, self.spec.prefill)
        system = [] if self.spec.system is None else [{"role": "system", "content": self.spec.system}]
        return Question([*system, *as_turns(content)], self.spec.prefill)


def _named(pair: tuple[str, str]) -> dict[str, str]:
    first, second = pair
    return {"a": first, "b": second, "response": first, "reference": second}


def seed_of(question: Question, seed: int) -> int:
    """Return the seed of a question's answer; it does not depend on other questions."""
    content = json.dumps([seed, question.prompt, question.prefill], sort_keys=True)
    return int.from_bytes(blake3.blake3(content.encode("utf-8", "surrogatepass")).digest(4), "big")


# With less of the next token than this, the shares of `tokens:` are shares of noise.
_LEAST = 0.01
# What a reasoning model writes before its answer. Its last part may be cut.
_THOUGHTS = re.compile(r"^.*(?:</think>|\[/THINK\])\s*|(?:<think>|\[THINK\]).*$", re.DOTALL)
_THINKS = (
    "set `chat_template_kwargs: {enable_thinking: false}` if its template knows it, or read its answer with `pattern:`"
)
# What follows a number that a pattern cuts, as (\d) does in "Score: 10".
_MORE_DIGITS = re.compile(r"\.?\d+")
_SHOWN = 160


def verdict_texts(spec: RewardSpec) -> tuple[str, ...]:
    """Return the texts that a declaration asks for as the next token; none if the judge writes its verdict."""
    return spec.token or tuple(spec.tokens)


def refuse_thoughts(question: str, where: str) -> None:
    """Refuse a question, as the judge gets it, that ends within its thoughts: no verdict is the next token."""
    last = question.rstrip()[-_SHOWN:]
    if last.rfind("<think>") > last.rfind("</think>"):
        what = "the judge's answer begins with thoughts"
        raise fail(what, where=where, expected="a verdict as the next token", got=repr(last), remedy=_THINKS)


def of_next_token(found: NextToken, spec: RewardSpec, where: str) -> float | Problem:
    """Return the score of a verdict in one token, or why there is none.

    Σ P(text) for `token:`; Σ value·P(text) / Σ P(text) for `tokens:`.
    """
    texts, total = verdict_texts(spec), math.fsum(found.shares)
    if found.other.strip() == "<think>":
        what = "the judge thinks before it answers"
        return Problem(what, where=where, got=f"{found.other!r} as the likeliest token for", remedy=_THINKS)
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
    """Return the score that the pattern finds in an answer, or why there is none.

    What a judge thinks is no verdict, unless the pattern itself names the marks of its thoughts.
    """
    whole = spec.prefill + found.text
    text = whole if "think" in str(spec.pattern).lower() else _THOUGHTS.sub("", whole)
    matches = list(re.finditer(str(spec.pattern), text))
    if not found.ended and (spec.match == "last" or (matches and matches[0].end() == len(text))):
        return _no_verdict(
            "the judge's answer was cut before its end",
            where,
            whole,
            "an answer that ends",
            "raise `max_new_tokens:`" + (", or set `match: first`" if spec.match == "last" else ""),
        )
    if not matches:
        remedy = "correct `pattern:` or the template, raise `max_new_tokens:`, or set `unmatched: abstain`"
        return _no_verdict("the judge's answer has no verdict", where, whole, f"a match of {spec.pattern!r}", remedy)
    found_at = matches[-1 if spec.match == "last" else 0]
    verdict = _captured(found_at)
    if spec.verdicts:
        if verdict in spec.verdicts:
            return spec.verdicts[verdict]
        known = f"one of {', '.join(map(repr, spec.verdicts))}"
        return _no_verdict(f"no value for the verdict {verdict!r}", where, text, known, "add it to `verdicts:`")
    try:
        number = float(verdict)
    except ValueError:
        number = math.nan
    if math.isfinite(number) and (more := _MORE_DIGITS.match(text, found_at.end(found_at.re.groups))):
        remedy = r"let its group take the whole number: `(\d+(?:\.\d+)?)`"
        return _no_verdict(f"`pattern:` takes {verdict} of {verdict}{more[0]}", where, text, "a whole number", remedy)
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

"""A judge behind an OpenAI-compatible server: its questions as chat completions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rewarded_lines.errors import Problem
from rewarded_lines.reward_settings import RewardSpec
from rewarded_lines.rewards.failed_scores import Failed
from rewarded_lines.rewards.judge_questions import Answer, NextToken, Question, seed_of
from rewarded_lines.rewards.reward_server import Places, RewardServer

_PATH = "/chat/completions"
# The most that OpenAI's servers return.
_TOP = 20
# A text that is not among the likeliest tokens has at most the share of the last of them.
_NEGLIGIBLE = 0.01
_SHOWN = 200
# Servers have other words for an answer that ended by itself, but these for one that was cut.
_CUT = ("length", "max_tokens", "content_filter")
# Some servers take no larger seeds.
_MOST_SEEDS = 2**31


class ApiJudge:
    """Answers the questions of one reward through a server; see `Answerer`."""

    size, device, tokenizer, limit = 0, "cpu", None, None
    loaded = streams = True
    # Which weights the server has is unknown: model, URL and `version` stand for them.
    fingerprint = "declared"

    def __init__(self, name: str, spec: RewardSpec) -> None:
        """Ask for the server's models, to learn that it is there and takes the key."""
        self._spec, self._where = spec, f"reward `{name}`"
        url = str(spec.url).rstrip("/").removesuffix(_PATH)
        served = spec.model_copy(update={"url": url})
        self._server = RewardServer(name, served, "an OpenAI-compatible chat completion")
        try:
            # A key may be good for chat completions only: then this is 403.
            self._server.check("GET", "/models", wrong=(401, 407))
        except BaseException:
            self.free()
            raise

    @property
    def shared(self) -> object:
        """It shares nothing."""
        return self

    def free(self) -> None:
        """End all connections."""
        self._server.free()

    def rest(self) -> None:
        """See `Answerer.rest`: the weights are the server's."""

    def check(self, questions: Sequence[Question]) -> None:
        """Leave the check to the server, which has the chat template."""

    def lengths(self, questions: Sequence[Question]) -> list[int]:
        """Return zeros: the server has the tokenizer."""
        return [0] * len(questions)

    def answers(self, questions: Sequence[Question]) -> Iterator[Mapping[int, Answer | Problem]]:
        """See `Answerer.answers`."""
        settings = {"temperature": self._spec.temperature, "max_tokens": self._spec.max_new_tokens}
        return self._asked(questions, settings, _answer)

    def next_tokens(
        self, questions: Sequence[Question], texts: Sequence[str]
    ) -> Iterator[Mapping[int, NextToken | Problem]]:
        """See `Answerer.next_tokens`; shares are of the server's 20 likeliest tokens."""
        settings = {"temperature": 0.0, "max_tokens": 1, "logprobs": True, "top_logprobs": _TOP}
        return self._asked(questions, settings, lambda choice: _next_token(choice, texts))

    def _asked(
        self, questions: Sequence[Question], settings: Mapping[str, Any], read: Callable[[Any], Any]
    ) -> Iterator[dict[int, Any]]:
        def request(places: Places) -> dict[str, Any]:
            question = questions[places[0]]
            seed = seed_of(question, self._spec.seed)
            content = {"model": self._spec.judge, "messages": question.prompt, "seed": seed % _MOST_SEEDS, **settings}
            if self._spec.chat_template_kwargs:
                content["chat_template_kwargs"] = self._spec.chat_template_kwargs
            return {key: value for key, value in {**content, **self._spec.request}.items() if value is not None}

        def found(content: Any, places: Places) -> list[Any]:
            try:
                return [read(content["choices"][0])]
            except (LookupError, TypeError, AttributeError) as error:
                raise ValueError(f"an answer of another form: {str(content)[:_SHOWN]}") from error

        groups = ([at] for at in range(len(questions)))
        for some in self._server.answers(_PATH, groups, request, found):
            yield {at: self._problem(one) if isinstance(one, Failed) else one for at, one in some.items()}

    def _problem(self, failed: Failed) -> Problem:
        return Problem(failed.words, where=f"{self._where}, {failed.where}")


def _answer(choice: Any) -> Answer:
    message = choice["message"]
    return Answer(str(message.get("content") or message.get("refusal") or ""), choice.get("finish_reason") not in _CUT)


def _next_token(choice: Any, texts: Sequence[str]) -> NextToken | Failed:
    """Return the shares of the texts as the next token, or why the likeliest tokens do not tell them."""
    if not (choice.get("logprobs") or {}).get("content"):
        raise ValueError("an answer without `logprobs`: the server gives none; read what it writes with `pattern:`")
    first = choice["logprobs"]["content"][0]
    top = {one["token"]: math.exp(one["logprob"]) for one in [first, *(first.get("top_logprobs") or [])]}
    likeliest = max(top, key=lambda token: top[token])
    for token, share in top.items():
        begun = [text for text in texts if token and text != token and text.startswith(token)]
        if begun and token not in texts and share >= _NEGLIGIBLE:
            return Failed(f"{begun[0]!r} is several tokens of the judge; name its first, {token!r}")
    if len(top) < 2 and set(texts) - set(top):
        raise ValueError("an answer with one token's probability only: the server gives no `top_logprobs`")
    if not set(texts) <= set(top) and min(top.values()) >= _NEGLIGIBLE:
        return Failed(f"the judge's {len(top)} likeliest tokens are not all of {', '.join(map(repr, texts))}")
    return NextToken(tuple(top.get(text, 0.0) for text in texts), "" if likeliest in texts else likeliest)

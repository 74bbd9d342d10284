"""A judge behind an OpenAI-compatible server: its questions as chat completions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from rewarded_lines.data.prompts import Prompt
from rewarded_lines.errors import Problem
from rewarded_lines.reward_settings import RewardSpec
from rewarded_lines.rewards.judge_questions import Answer, NextToken, Question, seed_of
from rewarded_lines.rewards.judge_rewards import JudgeReward
from rewarded_lines.rewards.reward import Columns
from rewarded_lines.rewards.reward_server import Places, RewardServer

_PATH = "/chat/completions"
# The most that OpenAI's servers return.
_TOP = 20
# A text that is not among the likeliest tokens has at most the share of the last of them.
_NEGLIGIBLE = 0.01
_SHOWN = 200
# Servers have other words for an answer that ended by itself, but these for one that was cut.
_CUT = ("length", "model_length", "max_tokens", "content_filter", "error")
# Some servers take no larger seeds.
_MOST_SEEDS = 2**31


class ApiJudge(JudgeReward):
    """A judge behind a server, which has the tokenizer and the chat template."""

    streams = True
    beside_engine = True
    # Which weights the server has is unknown: model, URL and `version` stand for them.
    fingerprint = "declared"

    def __init__(self, name: str, spec: RewardSpec) -> None:
        """Ask for the server's models, to learn that it is there and takes the key."""
        super().__init__(name, spec)
        parts = urlsplit(str(spec.url))
        path = parts.path.rstrip("/").removesuffix(_PATH).rstrip("/")
        served = spec.model_copy(update={"url": parts._replace(path=path).geturl()})
        self._server = RewardServer(name, served, "an OpenAI-compatible chat completion")
        # A key may be good for chat completions only: then this is 403.
        self._server.check("GET", "/models", wrong=(401, 407))

    def free(self) -> None:
        """End all connections."""
        self._server.free()

    def stream(
        self, prompts: Sequence[Prompt], responses: Sequence[str], columns: Columns = None
    ) -> Iterator[dict[int, float | Problem]]:
        """See `Reward.stream`."""
        return self._verdicts(prompts, responses, columns)

    def _answers(self, questions: Sequence[Question]) -> Iterator[Mapping[int, Answer | Problem]]:
        settings = {"temperature": self._spec.temperature, "max_tokens": self._spec.max_new_tokens}
        return self._requested(questions, settings, _answer)

    def _next_tokens(
        self, questions: Sequence[Question], texts: Sequence[str]
    ) -> Iterator[Mapping[int, NextToken | Problem]]:
        # Shares are of the server's 20 likeliest tokens.
        settings = {"temperature": 0.0, "max_tokens": 1, "logprobs": True, "top_logprobs": _TOP}
        return self._requested(questions, settings, lambda choice: _next_token(choice, texts))

    def _requested(
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
        return self._server.answers(_PATH, groups, request, found)


def _answer(choice: Any) -> Answer:
    message = choice["message"]
    content = message.get("content")
    if isinstance(content, list):
        # Reasoning models of some servers answer in parts, their thoughts among them.
        content = "".join(part["text"] for part in content if part.get("type") == "text")
    return Answer(str(content or message.get("refusal") or ""), choice.get("finish_reason") not in _CUT)


def _next_token(choice: Any, texts: Sequence[str]) -> NextToken | Problem:
    """Return the shares of the texts as the next token, or why the likeliest tokens do not tell them."""
    if not (choice.get("logprobs") or {}).get("content"):
        raise ValueError("an answer without `logprobs`: the server gives none; read what it writes with `pattern:`")
    first = choice["logprobs"]["content"][0]
    top = {one["token"]: math.exp(one["logprob"]) for one in [first, *(first.get("top_logprobs") or [])]}
    likeliest = max(top, key=lambda token: top[token])
    for token, share in top.items():
        begun = [text for text in texts if token and text != token and text.startswith(token)]
        if begun and token not in texts and share >= _NEGLIGIBLE:
            return Problem(f"{begun[0]!r} is several tokens of the judge; name its first, {token!r}")
    if len(top) < 2 and set(texts) - set(top):
        raise ValueError("an answer with one token's probability only: the server gives no `top_logprobs`")
    if not set(texts) <= set(top) and min(top.values()) >= _NEGLIGIBLE:
        return Problem(f"the judge's {len(top)} likeliest tokens are not all of {', '.join(map(repr, texts))}")
    return NextToken(tuple(top.get(text, 0.0) for text in texts), "" if likeliest in texts else likeliest)

"""Where a response ends and what its text is: the same in training, in measuring and in every engine."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rewarded_lines.config import GenerationSpec
from rewarded_lines.config_values import parse_strip
from rewarded_lines.data.chat_templates import render
from rewarded_lines.data.prompts import Prompt, split_text
from rewarded_lines.engines.base import Response, Tokens
from rewarded_lines.errors import fail

_THINK, _THOUGHT = "<think>", "</think>"


def prompts_told(tokenizer: Any, prompts: Sequence[Prompt], spec: GenerationSpec) -> str:
    """Return what a user may not expect of the prompts, or "".

    Texts are not turns, although the model has a chat template. Or rewards read thoughts, which it begins or allows.
    """
    if tokenizer.chat_template and all(isinstance(prompt, str) for prompt in prompts):
        return "the model reads texts without its chat template; `chat: true` makes turns of them"
    chats = [prompt for prompt in prompts[:1] if isinstance(prompt, list)]
    if spec.strip or not chats:
        return ""
    asked, off = (
        render(tokenizer, chats, add_generation_prompt=True, tokenize=False, **how)[0].rstrip()
        for how in ({}, {"enable_thinking": False})
    )
    # Templates such as Qwen3's end thoughts before they begin where they are turned off.
    if not asked.endswith(_THINK) and (not off.endswith(_THOUGHT) or asked.endswith(_THOUGHT)):
        return ""
    way = "begins each answer with" if asked.endswith(_THINK) else "lets answers begin with"
    return (
        f"the chat template {way} {_THINK}, so rewards read the thoughts, too; "
        f'`generation: {{strip: "{_THINK}…{_THOUGHT}"}}` hides them'
    )


@dataclass(frozen=True)
class ResponseReader:
    """Reads the responses of one model.

    Attributes:
        tokenizer: the model's.
        ends: ids that end a response; see `end_tokens`.
        stop: texts before which a response ends.
        strip: the two markers around the part of a response that is hidden from rewards.
    """

    tokenizer: Any
    ends: frozenset[int]
    stop: tuple[str, ...] = ()
    strip: tuple[str, str] | None = None

    @classmethod
    def of(cls, tokenizer: Any, ends: Iterable[int], spec: GenerationSpec) -> ResponseReader:
        """Return the reader for the settings of `spec`; its `stop_token_ids` end a response, too.

        Raises:
            UserError: a marker of `strip:` is a special token: decoding leaves it out of the text.
        """
        strip = parse_strip(spec.strip) if spec.strip else None
        for marker in strip or ():
            ids = tokenizer(marker, add_special_tokens=False)["input_ids"]
            if marker not in tokenizer.decode(ids, skip_special_tokens=True):
                raise fail(
                    f"the marker {marker!r} is a special token, which decoding leaves out of the text",
                    where=f"generation.strip: {spec.strip}",
                    expected="markers that decoding keeps",
                    got=str(tokenizer.name_or_path),
                    remedy="leave `strip:` out, or name markers that the tokenizer has as plain text",
                )
        return cls(tokenizer, frozenset([*ends, *spec.stop_token_ids]), spec.stop, strip)

    def text(self, prompt: Tokens, tokens: Tokens) -> tuple[str, bool]:
        """Return the text without its end token, up to the first stop text, and whether it has one."""
        own = list(tokens)
        while own and own[-1] in self.ends:
            own.pop()
        text = split_text([*prompt, *own], len(prompt), self.tokenizer)[1]
        found = [place for place in (text.find(end) for end in self.stop) if place >= 0]
        return (text[: min(found)], True) if found else (text, False)

    def until_stop(self, prompt: Tokens, tokens: Tokens) -> int | None:
        """Return how many tokens complete the first stop text; None if there is no stop text."""
        if not self.stop or not self.text(prompt, tokens)[1]:
            return None
        # With more tokens a complete stop text stays complete, so bisection finds the smallest number.
        counts = range(1, len(tokens))
        return 1 + bisect_left(counts, True, key=lambda count: self.text(prompt, tokens[:count])[1])

    def cut(self, prompt: Tokens, tokens: Tokens) -> tuple[tuple[int, ...], bool]:
        """Return the tokens of the response, and whether an end token or a stop text ended it."""
        end = next((place + 1 for place, token in enumerate(tokens) if token in self.ends), None)
        own = tuple(tokens[:end])
        stop = self.until_stop(prompt, own)
        return (own if stop is None else own[:stop]), end is not None or stop is not None

    def read(self, prompt: Tokens, tokens: Tokens) -> Response:
        """Return the response at the beginning of some tokens, without its probability."""
        return self.response(prompt, *self.cut(prompt, tokens), math.nan)

    def response(self, prompt: Tokens, tokens: Tokens, ended: bool, logprob: float) -> Response:
        """Return the response that consists of exactly these tokens."""
        text, stopped = self.text(prompt, tokens)
        done = ended or stopped or not self.ends.isdisjoint(tokens[-1:])
        return Response(text, tuple(tokens), done, logprob, self._visible(prompt, text) if self.strip else None)

    def end_of(self, response: Response) -> int:
        """Return the token that ended a response; −1 if it was cut short or a stop text ended it."""
        last = response.tokens[-1] if response.tokens else -1
        return last if last in self.ends else -1

    def _visible(self, prompt: Tokens, text: str) -> str:
        """Return a text without the parts between the markers; the prompt may end inside such a part."""
        assert self.strip is not None
        opening, closing = self.strip
        head = self.tokenizer.decode(list(prompt), skip_special_tokens=False)
        is_open, shown = head.rfind(opening) > head.rfind(closing), ""
        while text:
            if not is_open:
                before, marker, text = text.partition(opening)
                shown += before
                is_open = bool(marker)
            if is_open:
                # If the closing marker is missing, everything is hidden.
                _, marker, text = text.partition(closing)
                is_open = not marker
                text = text if shown.strip() else text.lstrip()
        return shown

"""Where a response ends and what its text is, read alike in training, in measuring and in every engine."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from rewarded_lines.config import GenerationSpec
from rewarded_lines.config_values import parse_strip
from rewarded_lines.data.prompts import split_text
from rewarded_lines.engines.base import Response, Tokens
from rewarded_lines.errors import fail


@dataclass(frozen=True)
class ResponseReader:
    """Reads the responses of one model.

    Attributes:
        tokenizer: of the model.
        ends: ids that end a response; see `end_tokens`.
        stop: texts before which a response ends.
        strip: the two markers around the part of a response that rewards do not see.
    """

    tokenizer: Any
    ends: frozenset[int]
    stop: tuple[str, ...] = ()
    strip: tuple[str, str] | None = field(default=None)

    @classmethod
    def of(cls, tokenizer: Any, ends: Iterable[int], spec: GenerationSpec) -> ResponseReader:
        """Return the reader for the settings of `spec`; its `stop_token_ids` end a response, too.

        Raises:
            UserError: a marker of `strip:` is a special token, which texts leave out.
        """
        strip = parse_strip(spec.strip) if spec.strip else None
        for marker in strip or ():
            ids = tokenizer(marker, add_special_tokens=False)["input_ids"]
            if marker not in tokenizer.decode(ids, skip_special_tokens=True):
                raise fail(
                    f"the marker {marker!r} is a special token, which the text of a response does not hold",
                    where=f"generation.strip: {spec.strip}",
                    expected="markers that stand in the text",
                    got=str(tokenizer.name_or_path),
                    remedy="leave `strip:` out, or name markers that the tokenizer has as plain text",
                )
        return cls(tokenizer, frozenset([*ends, *spec.stop_token_ids]), spec.stop, strip)

    def text(self, prompt: Tokens, tokens: Tokens) -> tuple[str, bool]:
        """Return a response's text without its end token, up to the first stop text, and whether there was one."""
        said = list(tokens)
        while said and said[-1] in self.ends:
            said.pop()
        text = split_text([*prompt, *said], len(prompt), self.tokenizer)[1]
        found = [place for place in (text.find(end) for end in self.stop) if place >= 0]
        return (text[: min(found)], True) if found else (text, False)

    def until_stop(self, prompt: Tokens, tokens: Tokens) -> int | None:
        """Return how many tokens it takes to complete the first stop text; None if there is none."""
        if not self.stop or not self.text(prompt, tokens)[1]:
            return None
        # More tokens keep a complete stop text complete, so the first length that has it is found by bisection.
        return 1 + bisect_left(range(1, len(tokens)), True, key=lambda count: self.text(prompt, tokens[:count])[1])

    def cut(self, prompt: Tokens, tokens: Tokens) -> tuple[tuple[int, ...], bool]:
        """Return the tokens that belong to a response, and whether it ended: by an end token, or by a stop text."""
        end = next((place + 1 for place, token in enumerate(tokens) if token in self.ends), None)
        own = tuple(tokens[:end])
        stop = self.until_stop(prompt, own)
        return (own if stop is None else own[:stop]), end is not None or stop is not None

    def read(self, prompt: Tokens, tokens: Tokens) -> Response:
        """Return the response that some tokens begin with, without its probability."""
        own, ended = self.cut(prompt, tokens)
        return self.response(prompt, own, ended, math.nan)

    def response(self, prompt: Tokens, tokens: Tokens, ended: bool, logprob: float) -> Response:
        """Return the response that consists of exactly these tokens."""
        text, stopped = self.text(prompt, tokens)
        done = ended or stopped or (bool(tokens) and tokens[-1] in self.ends)
        seen = self._visible(text, self._is_open(prompt)) if self.strip else None
        return Response(text, tuple(tokens), done, logprob, seen)

    def end_of(self, response: Response) -> int:
        """Return the token that ended a response; −1 if it was cut short or a stop text ended it."""
        last = response.tokens[-1] if response.tokens else -1
        return last if last in self.ends else -1

    def _is_open(self, prompt: Tokens) -> bool:
        """Return whether a prompt ends between the markers, for example because its template opens the thinking."""
        assert self.strip is not None
        opening, closing = self.strip
        text = self.tokenizer.decode(list(prompt), skip_special_tokens=False)
        return bool(text.rfind(opening) > text.rfind(closing))

    def _visible(self, text: str, is_open: bool) -> str:
        assert self.strip is not None
        opening, closing = self.strip
        shown = []
        while text:
            if not is_open:
                before, marker, text = text.partition(opening)
                shown.append(before)
                is_open = bool(marker)
            if is_open:
                # If the thinking never ends there is no answer.
                _, marker, text = text.partition(closing)
                is_open = not marker
                text = text if "".join(shown).strip() else text.lstrip()
        return "".join(shown)

"""What a server said: a whole response, or why there is none; and how long to wait before the next attempt."""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from typing import Any

# Seconds.
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 30.0
LONGEST_TOLD = 120.0
"""A server that asks for a longer wait is not waited for."""
SHOWN = 300
"""Characters of a server's own words in a message."""
# Its own, since training seeds the global one.
_random = random.Random()


@dataclass(frozen=True)
class HttpAnswer:
    """A whole response of any status; the names of headers are in lower case."""

    status: int
    headers: Mapping[str, str]
    text: str

    @property
    def good(self) -> bool:
        """Whether the status says success."""
        return 200 <= self.status < 300

    def json(self) -> Any:
        """Return the content of the JSON; a ValueError if it is none."""
        return json.loads(self.text)

    def with_told_status(self) -> HttpAnswer:
        """Return a success that holds an error with the error's code as its status, as OpenRouter sends them."""
        code = str(error.get("code")) if isinstance(error := _error_in(self.json()), dict) else ""
        return replace(self, status=int(code)) if re.fullmatch("[45][0-9][0-9]", code) else self

    @property
    def words(self) -> str:
        """The status and the server's message."""
        try:
            content = self.json()
            error = _error_in(content) or content.get("detail", content)
            message = str(error.get("message", error) if isinstance(error, dict) else error)
        except (ValueError, AttributeError):
            message = self.text
        moved = f" (moved to {self.headers['location']})" if "location" in self.headers else ""
        return f"status {self.status}: {message}{moved}"


def _error_in(content: Any) -> Any:
    """Return the error that an answer's JSON holds, by itself or in its first choice; None without one."""
    if not isinstance(content, dict):
        return None
    choices = content.get("choices")
    first = choices[0] if isinstance(choices, list) and choices else None
    return first.get("error") if isinstance(first, dict) else content.get("error")


class HttpFailure(Exception):
    """A request without a usable answer, after all its attempts.

    Attributes:
        words: what happened: the status and the server's own words, without secrets.
        status: of the server's last answer; None without an answer.
        reached: False if nothing listens at the address.
    """

    def __init__(self, words: str, status: int | None = None, reached: bool = True) -> None:
        """Keep what happened."""
        super().__init__(words)
        self.words, self.status, self.reached = words, status, reached


def backoff(tries: int) -> float:
    """Return the seconds to wait after an attempt; random, so that not all requests come back together."""
    return min(_LONGEST_WAIT, _FIRST_WAIT * 2**tries) * _random.uniform(0.5, 1.0)


def told_wait(response: HttpAnswer) -> float | None:
    """Return the seconds that a server asks to wait, from a number or a date; None if it does not say."""
    said = response.headers.get("retry-after", "")
    with suppress(ValueError):
        return max(0.0, float(said))
    with suppress(ValueError, TypeError):
        return max(0.0, parsedate_to_datetime(said).timestamp() - time.time())
    return None

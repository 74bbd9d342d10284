"""Errors of users: one exception with problems, each with what, where, expected, got and remedy.

The command line prints a `UserError` and exits with 1; Python callers catch it. `assert` is for our own bugs.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_LONGEST = 1000
_CHANGES_SHOWN = 12
_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
# A shorter text is no token and may be part of a word.
_SHORTEST_TOKEN = 8
# A parameter of a URL that is likely to hold a secret, such as "?api_key=".
_URL_KEY = r"([?&][\w.-]*(?:key|token|secret|password|signature|sig)=)"


@dataclass(frozen=True)
class Problem:
    """One fault in the user's input, with its remedy."""

    what: str
    where: str = ""
    expected: str = ""
    got: str = ""
    remedy: str = ""

    def __str__(self) -> str:
        """Return a headline, then an indented line for each known part."""
        headline = f"{self.where}: {self.what}" if self.where else self.what
        parts = (("expected", self.expected), ("got", self.got), ("remedy", self.remedy))
        return printable("\n".join([_brief(headline), *(f"  {name}: {_brief(text)}" for name, text in parts if text)]))


class UserError(Exception):
    """A mistake that the user can correct, with all its problems."""

    def __init__(self, problems: Problem | Iterable[Problem]) -> None:
        """Keep one problem, or several in their order."""
        self.problems: tuple[Problem, ...] = (problems,) if isinstance(problems, Problem) else tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))

    def __reduce__(self) -> tuple[Any, ...]:
        """Let the error be pickled."""
        return UserError, (self.problems,)


def printable(text: str) -> str:
    """Escape control characters: names and values from others' files could control a terminal."""
    return "".join(char if char.isprintable() or char == "\n" else ascii(char)[1:-1] for char in text)


def masked(text: str) -> str:
    """Return `text` without access tokens for the Hub."""
    for name in _TOKENS:
        token = os.environ.get(name, "").strip()
        text = text.replace(token, f"${name}") if len(token) >= _SHORTEST_TOKEN else text
    return re.sub(r"\bhf_[A-Za-z0-9]{30,}", "hf_…", text)


def without_secrets(text: str) -> str:
    """Return `text` without the passwords and keys of the URLs in it."""
    return re.sub(rf"{_URL_KEY}([^&#\s'\"]+)", r"\1…", re.sub(r"(?<=://)[^/@\s'\"]+@", "…@", text))


def _brief(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]} … {text[-_LONGEST // 2 :]}"


def fail(what: str, **parts: str) -> UserError:
    """Return a `UserError` with one `Problem`; `parts` are its where, expected, got and remedy."""
    return UserError(Problem(what, **parts))


def listed(names: Sequence[object], most: int) -> str:
    """Return at most so many names, such as "a, b and 3 more"."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(str, names[:most])) + more


def few(problems: Sequence[Problem], where: str, most: int, more: str = "more likewise") -> list[Problem]:
    """Return at most so many problems, and one with the number of the others."""
    rest = len(problems) - most
    return [*problems[:most], *([Problem(f"{rest} {more}", where)] if rest > 0 else [])]


def did_you_mean(word: str, known: Iterable[str], otherwise: str = "", likeness: float = 0.5) -> str:
    """Return a remedy with the known word most similar to `word`, or `otherwise` if none has this likeness, 0 to 1."""
    alike = difflib.get_close_matches(word, list(known), n=1, cutoff=likeness)
    return f"did you mean `{alike[0]}`?" if alike else otherwise


def differences(before: Any, now: Any, place: str = "") -> Iterator[str]:
    """Yield one line for every value that differs."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for name in dict.fromkeys([*before, *now]):
            yield from differences(before.get(name), now.get(name), f"{place}.{name}" if place else name)
    elif before != now:
        yield f"{place}: {_short(before)} → {_short(now)}"


def changed(found: Sequence[str]) -> str:
    """Return what differs as the `got` of a problem, at most some lines."""
    more = [f"and {len(found) - _CHANGES_SHOWN} more"] if found[_CHANGES_SHOWN:] else []
    return "\n    ".join(["what is different now:", *found[:_CHANGES_SHOWN], *more])


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 40 else text[:16] + "…"

"""Checks of values in a project file that need more than a type: formats, markers, templates, ranges, steps.

pydantic turns the ValueError of a check into the problem of a key.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from pydantic import AfterValidator, BaseModel, ConfigDict

from rewarded_lines.errors import without_secrets

# The template of a reward model that formats conversations with its own chat template.
CHAT = "chat"
TEXT = "{prompt}{response}"


class Strict(BaseModel):
    """Base of every config section: frozen, with finite numbers and no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


# A class, perhaps with a weight; signs need no spaces between numbers.
_TERM = r"(\d+)(?:x(\d+(?:\.\d+)?))?"
_WEIGHTED = re.compile(r"(?P<first>\d+(?:\.\d+)?) x (?P<name>.+)")
_WITH_WEIGHT = re.compile(r"(?P<name>.+?)( ?)x\2(?P<last>\d+(?:\.\d+)?)")
# A sign between spaces, with an even number of quotes after it.
_SIGN = re.compile(r""" ([+-]) (?=(?:[^"]*"[^"]*")*[^"]*$)""")


def parse_format(text: str, names: Sequence[str] = ()) -> tuple[tuple[int | str, float], ...]:
    """Return the terms (class, weight) of a reward's format, such as "1-0", "0x0.4" or "helpful - 0.2 x verbose".

    A class is its number or its name. Signs between names have spaces around them. Where a text can be read in two
    ways, one of `names` is the name that it is; quotes (`"a - b"`) make a name of any text.
    """
    if re.fullmatch(rf"-?{_TERM}(?:[+-]{_TERM})*", text):
        found = re.findall(rf"([+-]?){_TERM}", text)
        return tuple((int(index), (-1.0 if sign == "-" else 1.0) * float(weight or 1)) for sign, index, weight in found)
    if text in names:
        return ((text, 1.0),)
    first, *rest = _SIGN.split(text)
    signed = [("+", first), *zip(rest[::2], rest[1::2], strict=True)]
    terms = [_named_term(part, names) for _, part in signed]
    if None in terms:
        raise ValueError(f"{text!r} is not a reward format such as '0', '1-0', '0x0.4' or 'NAME - 0.2 x NAME'")
    return tuple(
        (one[0], -one[1] if sign == "-" else one[1]) for (sign, _), one in zip(signed, terms, strict=True) if one
    )


def _named_term(text: str, names: Sequence[str]) -> tuple[int | str, float] | None:
    """Return a class, by number or name, with its weight; None if the text has none."""
    if text in names:
        return text, 1.0
    sign, text = (-1.0, text[1:].lstrip()) if text.startswith("-") else (1.0, text)
    weight = 1.0
    if text not in names and (found := _WEIGHTED.fullmatch(text) or _WITH_WEIGHT.fullmatch(text)):
        text, weight = found["name"], float(found.groupdict().get("first") or found.groupdict()["last"])
    if text.isdecimal() and text not in names:
        return int(text), sign * weight
    if len(text) > 2 and text[0] == text[-1] == '"':
        return text[1:-1], sign * weight
    # Without a letter it is a number that is wrongly written.
    return (text, sign * weight) if re.search(r"[^\d.x+ -]", text) else None


def parse_strip(text: str) -> tuple[str, str]:
    """Return the two markers of `strip:`, for instance "<think>" and "</think>"."""
    opening, dots, closing = text.replace("...", "…").partition("…")
    if not (dots and opening and closing):
        raise ValueError(f"{text!r} is not two markers with … between them, such as '<think>…</think>'")
    return opening, closing


def checked(check: Callable[[Any], object]) -> AfterValidator:
    """Return a validator that returns the value unchanged unless `check` raises."""

    def keep(value: Any) -> Any:
        check(value)
        return value

    return AfterValidator(keep)


def check_template(value: str | tuple[str, str]) -> None:
    """Refuse a template without a response; {a} and {b} are two, for a judge."""
    text = "".join(value)
    if value != CHAT and "{response}" not in text and not ("{a}" in text and "{b}" in text):
        raise ValueError("the template must contain {response} (and usually {prompt}), or be `chat`")


def check_url(value: str) -> None:
    """Refuse what is not http:// or https://, and a URL with a secret: records show it."""
    if not re.match(r"https?://[^/\s]", value):
        raise ValueError("a URL begins with http:// or https:// and a host")
    if without_secrets(value) != value:
        raise ValueError("the URL holds a secret; put it into an environment variable and name that in `key_env:`")


def parse_memory(text: str) -> float:
    """Return the bytes of "24GiB" or "24 GB", or the share of "30%"."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(%|[KMGT]i?B)\s*", text)
    if not found or not (amount := float(found[1])) or (found[2] == "%" and amount > 100):
        raise ValueError(f"{text!r} is no amount of memory such as 24GiB, or a share such as 30%")
    if found[2] == "%":
        return amount / 100
    step = 1024 if "i" in found[2] else 1000
    return amount * float(step ** ("KMGT".index(found[2][0]) + 1))


def check_variables(value: dict[str, Any]) -> None:
    """Refuse variables of a chat template that JSON cannot hold, or with other names than identifiers."""
    for name, one in value.items():
        if not name.isidentifier():
            raise ValueError(f"{name!r} is not a variable's name")
        try:
            json.dumps(one, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name}: {one!r} is no text, number, list or mapping; quote it") from error


def check_scales(value: Any) -> None:
    """Refuse what is no finite number, text, list of such, or mapping from policies to such."""
    parts = list(value.values()) if isinstance(value, dict) else value
    if isinstance(parts, list | tuple) and parts:
        for part in parts:
            check_scales(part)
    elif not isinstance(value, str | int) and not (isinstance(value, float) and math.isfinite(value)):
        raise ValueError(f"{value!r} is not a finite number, nor numbers by policy or by block")


def check_range(value: tuple[float, float]) -> None:
    """Refuse a range whose end is below its start."""
    if not value[0] <= value[1]:
        raise ValueError("the range is [lowest, highest]")


def points_of(step: Any) -> int:
    """Return the number of λ that a step gives on each edge of the simplex."""
    count = round(1 / step) if isinstance(step, int | float) and 1e-6 <= step <= 1 else 0
    if not count or abs(count * step - 1) > 1e-9:
        raise ValueError(f"a step of {step!r} does not divide 1; take 0.1, 0.2, 0.25 ...")
    return count + 1

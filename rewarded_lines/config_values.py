"""Checks of values in a project file that need more than a type: formats, markers, templates, ranges, steps.

pydantic turns the ValueError of a check into the problem of a key.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from pydantic import AfterValidator, BaseModel, ConfigDict

from rewarded_lines.errors import has_secret

# The template of a reward model that formats conversations with its own chat template.
CHAT = "chat"


class Strict(BaseModel):
    """Base of every config section: frozen, with finite numbers and no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def parse_format(text: str) -> tuple[tuple[int, float], ...]:
    """Return the terms (class, weight) of a reward format such as "0", "1-0" or "0x0.4"."""
    term = r"(\d+)(?:x(\d+(?:\.\d+)?))?"
    if not re.fullmatch(rf"-?{term}(?:[+-]{term})*", text):
        raise ValueError(f"{text!r} is not a reward format such as '0', '1-0' or '0x0.4'")
    found = re.findall(rf"([+-]?){term}", text)
    return tuple((int(index), (-1.0 if sign == "-" else 1.0) * float(weight or 1)) for sign, index, weight in found)


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
    """Refuse a template without a response."""
    if value != CHAT and "{response}" not in "".join(value):
        raise ValueError("the template must contain {response} (and usually {prompt}), or be `chat`")


def check_url(value: str) -> None:
    """Refuse what is not http:// or https://, and a URL with a secret: records show it."""
    if not re.match(r"https?://[^/\s]", value):
        raise ValueError("a URL begins with http:// or https:// and a host")
    if has_secret(value):
        raise ValueError("the URL holds a secret; put it into an environment variable and name that in `key_env:`")


def check_variables(value: dict[str, Any]) -> None:
    """Refuse variables of a chat template that JSON cannot hold, or with other names than identifiers."""
    for name, one in value.items():
        if not name.isidentifier():
            raise ValueError(f"{name!r} is not a variable's name")
        try:
            json.dumps(one, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name}: {one!r} is no text, number, list or mapping; quote it") from error


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

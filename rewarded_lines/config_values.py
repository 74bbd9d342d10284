"""Values in a project file that need more than a type: formats, markers, templates, ranges, steps.

A check raises ValueError, which pydantic turns into the problem of a key.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from pydantic import AfterValidator

# The template of a reward model that reads conversations by its own chat template.
CHAT = "chat"
_SMALLEST_STEP = 1e-6


def parse_format(text: str) -> tuple[tuple[int, float], ...]:
    """Return the terms (class, weight) of a reward format such as "0", "1-0" or "0x0.4".

    Raises:
        ValueError: when `text` is not a signed sum of CLASS or CLASSxWEIGHT.
    """
    term = r"(\d+)(?:x(\d+(?:\.\d+)?))?"
    if not re.fullmatch(rf"-?{term}(?:[+-]{term})*", text):
        raise ValueError(f"{text!r} is not a reward format such as '0', '1-0' or '0x0.4'")
    found = re.findall(rf"([+-]?){term}", text)
    return tuple((int(index), (-1.0 if sign == "-" else 1.0) * float(weight or 1)) for sign, index, weight in found)


def parse_strip(text: str) -> tuple[str, str]:
    """Return the two markers of `strip:`, for instance "<think>" and "</think>".

    Raises:
        ValueError: when `text` is not two markers with … (or ...) between them.
    """
    opening, dots, closing = text.replace("...", "…").partition("…")
    if not (dots and opening and closing):
        raise ValueError(f"{text!r} is not two markers with … between them, such as '<think>…</think>'")
    return opening, closing


def checked(check: Callable[[Any], object]) -> AfterValidator:
    """Return a validator that keeps every value which `check` does not refuse."""

    def keep(value: Any) -> Any:
        check(value)
        return value

    return AfterValidator(keep)


def check_template(value: str | tuple[str, str]) -> None:
    """Refuse a template that shows no response."""
    if value != CHAT and "{response}" not in "".join(value):
        raise ValueError("the template must contain {response} (and usually {prompt}), or be `chat`")


def check_variables(value: dict[str, Any]) -> None:
    """Refuse variables of a chat template that JSON cannot hold, or whose names are not names."""
    for name, one in value.items():
        if not name.isidentifier():
            raise ValueError(f"{name!r} is not the name of a template's variable")
        try:
            json.dumps(one, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name}: {one!r} is no text, number, list or mapping; quote it") from error


def check_range(value: tuple[float, float]) -> None:
    """Refuse a range whose end is below its start."""
    if not value[0] <= value[1]:
        raise ValueError("the range is [lowest, highest]")


def points_of(step: Any) -> int:
    """Return how many λ a step makes on each edge of the simplex."""
    count = round(1 / step) if isinstance(step, int | float) and _SMALLEST_STEP <= step <= 1 else 0
    if not count or abs(count * step - 1) > 1e-9:
        raise ValueError(f"a step of {step!r} does not divide 1; take 0.1, 0.2, 0.25 ...")
    return count + 1

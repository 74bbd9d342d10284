"""What a check finds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "warning", "broken"]


@dataclass(frozen=True)
class Finding:
    """One check's result.

    Attributes:
        name: what was looked at.
        state: "ok"; "warning" for what is missing or may hurt; "broken" for what fails a command of this installation.
        found: what is there, in a sentence at most.
        remedy: what mends it, one command or hint a line.
    """

    name: str
    state: State
    found: str
    remedy: str = ""

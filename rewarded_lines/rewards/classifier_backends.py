"""What a loaded classifier does, whichever library runs it, and the errors of one that cannot be loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from rewarded_lines.errors import UserError, fail


class Backend(Protocol):
    """A loaded classifier.

    Attributes:
        classes: how many logits it gives.
        size: bytes of its weights.
        longest: tokens that it can be given, if there is an end to it.
    """

    classes: int
    size: int
    longest: int | None

    def logits(self, ids: Sequence[Sequence[int]], types: Sequence[Sequence[int]] | None = None) -> list[list[float]]:
        """Return the logits of each text, given as tokens, with their token types where it is a pair of texts."""
        ...

    def close(self) -> None:
        """Free its memory."""
        ...


def cannot_load(where: str, reference: str, error: Exception, remedy: str = "") -> UserError:
    """Return the error of a model that a library could not load."""
    return fail("the model cannot be loaded", where=where, got=f"{reference}: {error}", remedy=remedy)


def no_classifier(where: str, got: str) -> UserError:
    """Return the error of a model without a classification head."""
    return fail(
        "not a classifier: weights of the head are missing",
        where=where,
        expected="a sequence classification checkpoint",
        got=got,
        remedy="train one with recipes/reward.py",
    )

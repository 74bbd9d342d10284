"""What a loaded classifier does, whichever library runs it, and the errors of one that cannot be loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from rewarded_lines.errors import UserError, fail

_OFFSET_POSITIONS = ("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "longformer", "roberta-prelayernorm")


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


def positions_of(config: Any) -> int | None:
    """Return how many tokens a model has positions for, if its config says so.

    Args:
        config: of the model's text part.
    """
    positions = getattr(config, "max_position_embeddings", None)
    # RoBERTa and its kin count positions from behind the padding token.
    if positions and config.model_type in _OFFSET_POSITIONS:
        positions -= (config.pad_token_id or 0) + 1
    return positions or None


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

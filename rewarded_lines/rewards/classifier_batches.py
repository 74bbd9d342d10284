"""Batches in which a text's score does not depend on the texts beside it.

A sum of floats depends on its order, and which kernel a library takes, and so that order, depends on the shape of what
it is given. So the shape is the text's own: its length rounded up, and for each such width a constant number of rows;
rows that are left over are filled. No row may be the same with and without padding in the batch either: models leave
the attention mask out, and take another kernel, when nothing in it is masked. So something in every batch is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_TOKENS_PER_ROW = 16
_FEWEST_ROWS = 2


@dataclass(frozen=True)
class Batch:
    """Texts for one call of a model.

    Attributes:
        members: which of the texts, at most `rows`.
        rows: how many rows the call has; those beyond the members are fillers.
        width: how many tokens each row has, padding included.
    """

    members: tuple[int, ...]
    rows: int
    width: int


def make_batches(lengths: Sequence[int], batch_size: int, longest: int | None = None) -> Iterator[Batch]:
    """Yield batches that hold every text once, short ones first; equal lengths always meet the same rows and width.

    Args:
        lengths: tokens of each text, 1 or more.
        batch_size: rows of texts up to 16 tokens; longer ones get fewer, so that a call has about as many tokens.
        longest: the most positions that the model has, if it has an end.
    """
    by_width: dict[int, list[int]] = {}
    for index in sorted(range(len(lengths)), key=lambda index: lengths[index]):
        by_width.setdefault(_width(lengths[index], longest), []).append(index)
    for width, members in by_width.items():
        rows = _rows(width, batch_size)
        # As many as the model can read may all be tokens: then a filler is what is masked.
        room = rows - 1 if width == longest else rows
        for start in range(0, len(members), room):
            yield Batch(tuple(members[start : start + room]), rows, width)


def _width(length: int, longest: int | None) -> int:
    """Return the width for texts of a length: a little more than it, in steps that grow with it."""
    step = 8 if length < 64 else 16 if length < 128 else 32
    width = length + step - length % step
    return width if longest is None or length > longest else min(width, longest)


def _rows(width: int, batch_size: int) -> int:
    """Return the number of rows for a width, a power of two: kernels deal out rows in such numbers, without a rest."""
    wanted = min(batch_size, _TOKENS_PER_ROW * batch_size // width)
    return max(1 << (max(wanted, 1).bit_length() - 1), _FEWEST_ROWS)

"""Pairs for a reward model from packages: a description's own synopsis against another package's.

A row of the data: `description` and `synopsis`.
"""

from __future__ import annotations

from collections import deque

Row = dict[str, str]
# Neighbours in the list are often built from one source and have almost the same synopsis.
DISTANCE = 50


class Contrast:
    """Pairs a package's synopsis with that of the package `distance` rows before, or of the first package.

    The pairs depend only on the order of the rows. This file is loaded again for every reading of the data, so each
    reading starts without memory.
    """

    def __init__(self, distance: int = DISTANCE) -> None:
        """Start a reading of the data."""
        self._before: deque[str] = deque(maxlen=distance)

    def __call__(self, row: Row) -> Row | None:
        """Return the pair; None for the first package and for equal synopses."""
        own, other = row["synopsis"], self._before[0] if self._before else row["synopsis"]
        self._before.append(own)
        if own == other:
            return None
        return {"prompt": row["description"], "chosen": own, "rejected": other}


contrast = Contrast()

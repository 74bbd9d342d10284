"""Pairs for a reward model out of packages: a description's own synopsis against another package's.

A row of the data: `description` and `synopsis`.
"""

from __future__ import annotations

from collections import deque

Row = dict[str, str]
# Packages that stand close together in a list are often made from one source and have almost the same synopsis.
DISTANCE = 50


class Contrast:
    """A package's synopsis against that of the package `distance` rows before it, or of the first one until then.

    The pairs follow from the order of the rows alone. What was seen is kept for one reading of the data, since this
    file is loaded anew for each.
    """

    def __init__(self, distance: int = DISTANCE) -> None:
        """Begin a reading."""
        self._before: deque[str] = deque(maxlen=distance)

    def __call__(self, row: Row) -> Row | None:
        """Return the pair; None for the first package, and where the two synopses are the same."""
        own, other = row["synopsis"], self._before[0] if self._before else row["synopsis"]
        self._before.append(own)
        if own == other:
            return None
        return {"prompt": row["description"], "chosen": own, "rejected": other}


contrast = Contrast()

"""The progress of long work: verbs report to a `Progress`; subclasses show it."""

from __future__ import annotations


class Progress:
    """Receives the progress of some work and shows nothing; any thread may call it.

    The counted units are bytes, points or checks; see the verb.
    """

    def tell(self, fact: str) -> None:
        """Tell a fact before the work that it is about, such as how much there is."""

    def expect(self, total: int) -> None:
        """Set or correct the total."""

    def start(self, step: str, counted: bool = False) -> None:
        """Start a step; steps that are not `counted` only prepare and are left out of the rate."""

    def advance(self, count: int, name: str = "") -> None:
        """Add finished units; `name` is the finished point or check, if it has a name."""


SILENT = Progress()

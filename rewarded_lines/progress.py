"""How far long work is: verbs tell a `Progress`, and whoever wants to see it derives from that class."""

from __future__ import annotations


class Progress:
    """Hears how far some work is, and shows nothing. Any thread may call it.

    What is counted are bytes, points or checks; see the verb.
    """

    def expect(self, total: int) -> None:
        """Say how much there is to do in all. Later calls correct earlier ones."""

    def start(self, step: str, counted: bool = False) -> None:
        """Say which step begins.

        Args:
            step: its name.
            counted: whether the step does what is counted. Steps that only prepare are left out of the rate.
        """

    def advance(self, count: int, name: str = "") -> None:
        """Say that `count` more are done; `name` is the point or check that was finished, if it has a name."""


SILENT = Progress()

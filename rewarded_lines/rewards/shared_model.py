"""A model that several rewards use: in memory once, freed for all, loaded again when it is needed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Generic, Protocol, TypeVar

from rewarded_lines.errors import fail


class Closable(Protocol):
    """What holds weights in memory."""

    def close(self) -> None:
        """Free the memory."""


Held = TypeVar("Held", bound=Closable)


class SharedModel(ABC, Generic[Held]):
    """Weights in memory while they are needed.

    Attributes:
        device: where they are.
        size: bytes of the weights, once they were loaded.
        fingerprint: a hash of the files that decide the model's output, once it was loaded.
    """

    size: int = 0
    fingerprint: str = ""

    def __init__(self, where: str, reference: str, device: str) -> None:
        """Load nothing yet; `where` names the first reward in messages."""
        self._where, self._reference, self.device = where, reference, device
        self._held: Held | None = None

    @property
    def held(self) -> Held:
        """The loaded model; the first call loads it, and so does the first one after `free`."""
        if self._held is None:
            if self.fingerprint and self.fingerprint != self._content():
                raise fail(
                    "the model changed since it was first loaded",
                    where=self._where,
                    got=self._reference,
                    remedy="start again once it is complete",
                )
            self._held = self._build()
            self.fingerprint = self.fingerprint or self._content()
        return self._held

    @property
    def loaded(self) -> bool:
        """Whether the weights are in memory."""
        return self._held is not None

    def free(self) -> None:
        """Free the memory; the next use loads the model again."""
        held, self._held = self._held, None
        if held is not None:
            held.close()

    @abstractmethod
    def _build(self) -> Held:
        """Load the model."""

    @abstractmethod
    def _content(self) -> str:
        """Return the hash of the files that decide the model's output."""

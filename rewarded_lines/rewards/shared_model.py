"""A model that several rewards use: in memory once, freed for all, loaded again when it is needed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

from rewarded_lines.errors import fail
from rewarded_lines.out_of_memory import NO_MEMORY, empty_cache, no_room, ran_out, tell
from rewarded_lines.processes import available_memory

# Of the computer's available memory, for weights that leave a GPU between uses.
_SHARE_OF_HOST = 0.8


# It has a `close` that frees the memory.
Held = TypeVar("Held", bound=Any)
Result = TypeVar("Result")


class SharedModel(ABC, Generic[Held]):
    """Weights in memory while they are needed.

    Attributes:
        device: where they are.
        size: bytes of the weights, once they were loaded.
        fingerprint: a hash of the files that decide the model's output, once it was loaded.
    """

    size: int = 0
    fingerprint: str = ""

    def __init__(self, where: str, reference: str, device: str, beside: Mapping[str, Any] | None = None) -> None:
        """Load nothing yet; models of other rewards, `beside`, leave the device if this one does not fit there, too."""
        self._where, self._reference, self.device = where, reference, device
        self._beside = {} if beside is None else beside
        self._held: Held | None = None
        self._rests = False

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
            self._held = self._with_room(self._build)
            self.fingerprint = self.fingerprint or self._content()
        if self._rests:
            self._with_room(lambda: self._moved(self.device))
            self._rests = False
        return self._held

    @property
    def loaded(self) -> bool:
        """Whether the weights are on the device."""
        return self._held is not None and not self._rests

    def free(self) -> None:
        """Free the memory; the next use loads the model again."""
        held, self._held, self._rests = self._held, None, False
        if held is not None:
            held.close()

    def rest(self) -> None:
        """Leave the device until the next use: the weights wait in the computer's memory, where they fit there."""
        if not self.loaded:
            return
        room = _SHARE_OF_HOST * available_memory("cpu")
        fits = self.device != "cpu" and hasattr(self._held, "move") and self.size <= room
        try:
            if fits:
                self._moved("cpu")
        except (ValueError, NotImplementedError):
            # Some quantized models stay where they were loaded.
            fits = False
        self._rests = fits
        if not fits:
            self.free()
        empty_cache()

    def _moved(self, device: str) -> None:
        self._held.move(device)  # type: ignore[union-attr]

    def _with_room(self, work: Callable[[], Result]) -> Result:
        """Do what takes memory of the device; if it runs out, let the other models leave, and try again."""
        try:
            return work()
        except NO_MEMORY as error:
            if not ran_out(error):
                raise
        others = [one for one in self._beside.values() if one is not self and one.loaded and one.device == self.device]
        if others:
            tell(f"{self._where}: memory ran out while its model was loaded; {len(others)} others leave {self.device}")
        for one in others:
            one.rest()
        try:
            return work()
        except NO_MEMORY as error:
            if not ran_out(error):
                raise
            raise no_room(self._where, f"{self._reference} does not fit", error) from error

    @abstractmethod
    def _build(self) -> Held:
        """Load the model."""

    @abstractmethod
    def _content(self) -> str:
        """Return the hash of the files that decide the model's output."""

"""Tensors in pinned memory of the host, and their copies to a GPU, made while it computes."""

from __future__ import annotations

import logging
import mmap
import weakref
from threading import Lock
from typing import Any

import numpy as np
import torch

# A flag of cudaHostRegister.
_ON_EVERY_GPU = 1


class PinnedMemory:
    """Keeps tensors where a GPU reads them without waiting for the processor.

    Their own memory is locked, with the length that it has: torch's allocator would round up to a power of 2.
    """

    def __init__(self, device: torch.device) -> None:
        """Make a stream for copies to the device."""
        self._device = device
        self._runtime: Any = torch.cuda.cudart()
        self._stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._locked: list[Any] = []
        # The finalizer keeps the memory until it is unlocked.
        self._unlock = weakref.finalize(self, _unlock, self._runtime, self._locked)
        self._ahead: dict[str, tuple[list[torch.Tensor], Any]] = {}
        self._lock, self._refused = Lock(), False

    def empty(self, size: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Return so many bytes, whole pages of their own, locked; any thread may call this.

        If the system locks no more, they are ordinary memory: then copies wait for the processor.
        """
        pages = mmap.mmap(-1, max(1, size))
        values = np.frombuffer(pages, np.uint8, size)
        if not size:
            return values
        # A new thread starts on the first GPU, whichever is this one's.
        with torch.cuda.device(self._device):
            status = self._runtime.cudaHostRegister(values.ctypes.data, size, _ON_EVERY_GPU)
        if int(status) == 0:
            with self._lock:
                self._locked.append(values)
        elif not self._refused:
            self._refused = True
            logging.getLogger(__name__).warning("the system locks no more memory: swaps will take longer")
        return values

    def there(
        self, name: str, rows: list[torch.Tensor], following: str, next_rows: list[torch.Tensor]
    ) -> list[torch.Tensor]:
        """Return a tensor's rows on the device, and start to copy those of the following tensor."""
        copies, copied = self._ahead.pop(name) if name in self._ahead else self._copy(rows)
        main = torch.cuda.current_stream(self._device)
        main.wait_event(copied)
        for row in copies:
            # The copying stream may use the memory again only after the merge.
            row.record_stream(main)
        try:
            self._ahead = {following: self._copy(next_rows)}
        except torch.OutOfMemoryError:
            # Without a copy in advance it still works.
            self._ahead = {}
        return copies

    def close(self) -> None:
        """Wait for the copies and unlock the memory."""
        self._stream.synchronize()
        self._ahead = {}
        self._unlock()

    def _copy(self, rows: list[torch.Tensor]) -> tuple[list[torch.Tensor], Any]:
        with torch.cuda.stream(self._stream):
            return [row.to(self._device, non_blocking=True) for row in rows], self._stream.record_event()


def _unlock(runtime: Any, locked: list[Any]) -> None:
    while locked:
        runtime.cudaHostUnregister(locked.pop().ctypes.data)

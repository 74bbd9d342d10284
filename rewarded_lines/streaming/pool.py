"""A few threads that share out a stream of work: the next item goes to whoever is free."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Generic, TypeVar

import numpy as np

T = TypeVar("T")


def share_out(items: Iterable[T], worker: Callable[[], Callable[[T], None]], threads: int = 0) -> None:
    """Have every item done once, by one of several threads; return when all are.

    Args:
        items: taken one at a time, in order, as threads become free.
        worker: called once in each thread; what it returns does an item, with buffers of its own.
        threads: 0 for one on each core this process may use; never more than there are items, if that is known.

    Raises:
        BaseException: the first that an item raised, or an interrupt; no further item is begun then.
    """
    line = _Line(iter(items))

    def attend() -> None:
        try:
            # Values that are not finite are counted and told at the end, not warned of by numpy.
            with np.errstate(all="ignore"):
                work = worker()
                for item in line:
                    work(item)
        except BaseException as error:  # noqa: BLE001 - raised again below, in the caller's thread
            line.stop(error)

    wanted = threads or cores()
    if isinstance(items, Sized):
        wanted = min(wanted, len(items))
    others = [threading.Thread(target=attend, daemon=True) for _ in range(wanted - 1)]
    try:
        for thread in others:
            thread.start()
        attend()
        _join(others)
    except BaseException as error:  # noqa: BLE001 - raised again below
        # An interrupt that came while we waited: nobody may still write when the caller cleans up.
        line.stop(error)
        _join(others)
    if line.error:
        raise line.error


def _join(threads: Iterable[threading.Thread]) -> None:
    for thread in threads:
        if thread.ident is not None:
            thread.join()


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0))


class Relay(Generic[T]):
    """Two steps that items pass in their order, whichever threads take them: one is in each step at a time."""

    def __init__(self, items: Iterable[T]) -> None:
        """Begin with the first item.

        Args:
            items: taken one at a time, in order.
        """
        self._items = iter(items)
        self._first, self._second = threading.Lock(), threading.Lock()

    def take(self, first: Callable[[T], object], second: Callable[[], object]) -> T:
        """Return the next item once it has passed both steps in the calling thread.

        Args:
            first: done with the item.
            second: done after it, while another thread may begin the first step of the next item.
        """
        held = False
        try:
            with self._first:
                item = next(self._items)
                first(item)
                # Taken before the first is let go, so that nobody overtakes.
                held = self._second.acquire()
            second()
        finally:
            if held:
                self._second.release()
        return item


class _Line(Iterator[T]):
    """An iterator that threads may share, and that any of them can end."""

    def __init__(self, items: Iterator[T]) -> None:
        self.error: BaseException | None = None
        self._items = items
        self._lock = threading.Lock()

    def __next__(self) -> T:
        with self._lock:
            if self.error:
                raise StopIteration
            return next(self._items)

    def stop(self, error: BaseException) -> None:
        with self._lock:
            self.error = self.error or error

"""Threads that share a stream of items."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from threading import Lock, Thread
from typing import Generic, TypeVar

import numpy as np

T = TypeVar("T")


def share_out(items: Iterable[T], worker: Callable[[], Callable[[T], object]], threads: int = 0) -> None:
    """Process every item once, each in one of several threads; return when all are done.

    The first exception of an item, or an interrupt, is raised; no further item starts then.

    Args:
        items: threads take them one at a time, in order.
        worker: called once in each thread; returns the function that processes an item with that thread's buffers.
        threads: 0 for one on each core that this process may use; never more than items.
    """
    waiting = deque(items)
    errors: list[BaseException] = []
    # An entry for each other thread that may hold an item.
    busy: list[None] = []

    def attend() -> None:
        try:
            # Values that are not finite are counted and reported at the end: numpy need not warn.
            with np.errstate(all="ignore"):
                work = worker()
                while True:
                    try:
                        item = waiting.popleft()
                    except IndexError:
                        return
                    work(item)
        except BaseException as error:  # noqa: BLE001 - raised below, in the caller's thread
            waiting.clear()
            errors.append(error)

    # No ThreadPoolExecutor: an interrupt during its `submit` may leave a lock held, so that it waits for ever.
    others = [
        Thread(target=_help, args=(waiting, busy, attend), daemon=True)
        for _ in range(min(threads or cores(), len(waiting)) - 1)
    ]
    try:
        for thread in others:
            thread.start()
        attend()
        for thread in others:
            thread.join()
    except BaseException as error:  # noqa: BLE001 - likewise
        waiting.clear()
        # An interrupt inside Python's own locks comes with the RuntimeError of a lock that is not held.
        inside = error.__context__
        errors.append(inside if isinstance(inside, KeyboardInterrupt) else error)
        # No thread still writes when the caller cleans up. Not by `join`: an interrupt inside `start` may leave a lock
        # held, and the thread waits for it for ever before it takes an item. One that begins later finds no item.
        while busy:
            time.sleep(0.001)
    if errors:
        try:
            raise errors[0]
        finally:
            # Its traceback holds this call and the work that failed: in a circle with the list, both would stay.
            errors.clear()


def _help(waiting: deque[T], busy: list[None], attend: Callable[[], None]) -> None:
    busy.append(None)
    try:
        if waiting:
            attend()
    finally:
        busy.pop()


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0))


class Relay(Generic[T]):
    """Two steps that items pass in order, in any thread; each step holds one item at a time."""

    def __init__(self, items: Iterable[T]) -> None:
        """Start with the first item."""
        self._items = iter(items)
        self._first, self._second = Lock(), Lock()

    def take(self, first: Callable[[T], object], second: Callable[[], object]) -> T:
        """Return the next item after both steps, which run in the calling thread.

        Meanwhile another thread may take the next item through the first step.
        """
        with ExitStack() as held:
            with self._first:
                item = next(self._items)
                first(item)
                # Before the first lock is released, so that no item overtakes another.
                held.enter_context(self._second)
            second()
        return item

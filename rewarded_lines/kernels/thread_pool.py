"""How work uses the processor: threads that share out a stream of items, and how wide the kernels' vectors are."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from threading import Lock
from typing import Generic, TypeVar

import numpy as np

T = TypeVar("T")


def share_out(items: Iterable[T], worker: Callable[[], Callable[[T], None]], threads: int = 0) -> None:
    """Process every item once, each in one of several threads; return when all are done.

    Args:
        items: taken one at a time, in order, as threads become free.
        worker: called once in each thread; returns the function that processes an item with that thread's buffers.
        threads: 0 for one on each core this process may use; never more than items.

    Raises:
        BaseException: the first that an item raised, or an interrupt; no further item is started then.
    """
    waiting = deque(items)

    def attend() -> None:
        try:
            # Values that are not finite are counted and reported at the end; numpy need not warn of them.
            with np.errstate(all="ignore"):
                work = worker()
                while (item := _taken(waiting)) is not None:
                    work(item[0])
        except BaseException:
            waiting.clear()
            raise

    wanted = min(threads or cores(), len(waiting))
    if wanted <= 1:
        return attend()
    # Leaving the pool waits for its threads: none still writes when the caller cleans up after an error.
    with ThreadPoolExecutor(wanted) as pool:
        try:
            for done in as_completed([pool.submit(attend) for _ in range(wanted)]):
                done.result()
        except BaseException:
            waiting.clear()
            raise


def _taken(waiting: deque[T]) -> tuple[T] | None:
    """Return the next item, None if there is none; threads may share the queue."""
    try:
        return (waiting.popleft(),)
    except IndexError:
        return None


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0))


def use_wide_vectors() -> None:
    """Let numba use the widest vectors of this processor in the whole process; call it before importing the kernels.

    LLVM keeps to 256 bits on processors that have 512, because it expects code that uses them rarely. The kernels use
    them all the time and take a third less time with 512. A setting of the user's own stays.
    """
    import llvmlite.binding
    import numba

    features = llvmlite.binding.get_host_cpu_features()
    if numba.config.CPU_FEATURES is None and features.get("avx512f"):
        numba.config.CPU_FEATURES = f"{features.flatten()},-prefer-256-bit"


class Relay(Generic[T]):
    """Two steps that items pass in order, whichever threads take them; each step holds one item at a time."""

    def __init__(self, items: Iterable[T]) -> None:
        """Start with the first item; items are taken one at a time, in order."""
        self._items = iter(items)
        self._first, self._second = Lock(), Lock()

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
                # Taken before the first lock is released, so that no item overtakes another.
                held = self._second.acquire()
            second()
        finally:
            if held:
                self._second.release()
        return item

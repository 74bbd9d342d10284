"""How work uses the processor: threads that share out a stream of items, and how wide the kernels' vectors are."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Generic, TypeVar

import numpy as np

T = TypeVar("T")


def share_out(items: Iterable[T], worker: Callable[[], Callable[[T], None]], threads: int = 0) -> None:
    """Process every item once, each in one of several threads; return when all are done.

    Args:
        items: taken one at a time, in order, as threads become free.
        worker: called once in each thread; returns the function that processes an item with that thread's buffers.
        threads: 0 for one on each core this process may use; never more than items, where `items` has a length.

    Raises:
        BaseException: the first that an item raised, or an interrupt; no further item is started then.
    """
    queue = _Queue(iter(items))

    def attend() -> None:
        try:
            # Values that are not finite are counted and reported at the end; numpy need not warn of them.
            with np.errstate(all="ignore"):
                work = worker()
                for item in queue:
                    work(item)
        except BaseException as error:  # noqa: BLE001 - raised again below, in the caller's thread
            queue.stop(error)

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
        # An interrupt while this thread waited: no thread may still write when the caller cleans up.
        queue.stop(error)
        _join(others)
    if queue.error:
        raise queue.error


def _join(threads: Iterable[threading.Thread]) -> None:
    for thread in threads:
        if thread.ident is not None:
            thread.join()


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
                # Taken before the first lock is released, so that no item overtakes another.
                held = self._second.acquire()
            second()
        finally:
            if held:
                self._second.release()
        return item


class _Queue(Iterator[T]):
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

"""Files of known length, written from several threads in any order; large ones past the page cache, if it can be."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

# A smaller file goes through the page cache.
LARGE = 64 << 20
# Bytes that are written to the disk at a time; and of each of many files, whose chunks are in memory together.
CHUNK = 4 << 20
_FEW = 4
# Addresses, places and lengths of such writes are multiples of a page.
_PAGE = mmap.PAGESIZE
_UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_fallocate = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


class Buffers:
    """Memory for chunks, which is used again."""

    def __init__(self, together: int = 1) -> None:
        """Start without memory; `together` files are written at the same time."""
        self.chunk = CHUNK if together <= _FEW else CHUNK // 4
        self._free: list[Bytes] = []

    def take(self) -> Bytes:
        """Return a buffer that begins at a page."""
        with suppress(IndexError):
            return self._free.pop()
        memory = mmap.mmap(-1, self.chunk)
        # The kernel pins the pages of each write: few large ones, if it has them.
        with suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
        return np.frombuffer(memory, np.uint8)

    def give_back(self, buffer: Bytes) -> None:
        """Let others use a buffer."""
        self._free.append(buffer)


class OutputFile:
    """A file of zeros, of which each byte is written at most once.

    Through the page cache, the kernel copies a large file once more and writes it late. So chunks are collected here,
    and the thread that completes one writes it to the disk (O_DIRECT). The page cache is left to the inputs.
    """

    def __init__(self, path: Path, size: int, buffers: Buffers | None) -> None:
        """Create the file at its full length, on disk blocks of its own; raise OSError if they are not free.

        Without `buffers` all goes through the page cache.
        """
        self._size, self._buffers = size, buffers or Buffers()
        self._chunk = self._buffers.chunk
        self._cached = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        self._direct = -1
        # Memory, the number of bytes that are missing, and from where to where the others are.
        self._begun: dict[int, tuple[Bytes, int, list[tuple[int, int]]]] = {}
        self._lock = Lock()
        try:
            _reserve(self._cached, size)
            if buffers is not None and size >= LARGE:
                # Some file systems refuse it.
                with suppress(OSError):
                    self._direct = os.open(path, os.O_WRONLY | os.O_DIRECT)
        except BaseException:
            os.close(self._cached)
            raise

    def write(self, place: int, data: Bytes) -> None:
        """Write bytes from a place on."""
        lent = self.lend(place, data.size)
        if lent is None:
            _write(self._cached, place, data)
            return
        for part in lent:
            part[:], data = data[: part.size], data[part.size :]
        self.take_back(place, sum(part.size for part in lent))

    def lend(self, place: int, size: int) -> list[Bytes] | None:
        """Return memory that will be written to a place, in one or several parts; None if there is none.

        Fill it, then call `take_back`; without that call it may be lent again.
        """
        if self._direct < 0:
            return None
        return [self._begin(number)[first:last] for number, first, last in self._chunks(place, size)]

    def take_back(self, place: int, size: int) -> None:
        """Take memory back that was lent and is filled."""
        for number, first, last in self._chunks(place, size):
            self._finish(number, first, last)

    def complete(self) -> None:
        """Write what there is of chunks in which bytes stay zero."""
        for number, (buffer, _, parts) in self._begun.items():
            for first, last in parts:
                _write(self._cached, number * self._chunk + first, buffer[first:last])
        self._begun.clear()

    def close(self) -> None:
        """Close the file; without `complete`, unfinished chunks are lost."""
        for descriptor in (self._cached, self._direct):
            if descriptor >= 0:
                os.close(descriptor)
        self._cached = self._direct = -1

    def _begin(self, number: int) -> Bytes:
        """Return the memory of a chunk."""
        with self._lock:
            if number not in self._begun:
                self._begun[number] = self._buffers.take(), min(self._chunk, self._size - number * self._chunk), []
            return self._begun[number][0]

    def _finish(self, number: int, first: int, last: int) -> None:
        """Note a filled part of a chunk; write the chunk if it was the last."""
        with self._lock:
            buffer, left, parts = self._begun[number]
            parts.append((first, last))
            self._begun[number] = buffer, left - (last - first), parts
            if left > last - first:
                return
            del self._begun[number]
        place = number * self._chunk
        chunk = buffer[: min(self._chunk, self._size - place)]
        # The end of the file is seldom the end of a page.
        whole = chunk.size - chunk.size % _PAGE
        try:
            _write(self._direct, place, chunk[:whole])
            done = whole
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            done = 0
        _write(self._cached, place + done, chunk[done:])
        self._buffers.give_back(buffer)

    def _chunks(self, place: int, size: int) -> Iterator[tuple[int, int, int]]:
        """Yield the numbers of the chunks that hold some bytes, and from where to where they lie in each."""
        end = place + size
        while place < end:
            number, first = divmod(place, self._chunk)
            last = min(self._chunk, end - number * self._chunk)
            yield number, first, last
            place = number * self._chunk + last


def _write(descriptor: int, place: int, data: Bytes) -> None:
    view = data.data
    while len(view):
        written = os.pwrite(descriptor, view, place)
        view, place = view[written:], place + written


def _reserve(descriptor: int, size: int) -> None:
    """Give a file its length and its disk blocks; where the file system cannot, its length alone.

    Not by `os.posix_fallocate`, which writes to every block where the file system cannot.
    """
    if _fallocate is not None and size:
        number = errno.EINTR
        # A signal ends it early. Its Python handler has run before the next try, and may raise.
        while number == errno.EINTR:
            if _fallocate(descriptor, 0, ctypes.c_long(0), ctypes.c_long(size)) == 0:
                return
            number = ctypes.get_errno()
        if number not in _UNSUPPORTED:
            raise OSError(number, os.strerror(number))
    os.ftruncate(descriptor, size)

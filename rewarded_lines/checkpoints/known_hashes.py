"""The hashes of files that have not changed: of this process, and of large files in the user's cache."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

Found = TypeVar("Found")
# A file of 64 MiB takes about 20 ms to hash; below that, the cache would be full of small files.
LARGE = 64 << 20
# A file system may give two writes the same time. A file that was written just now is not trusted yet.
_SETTLED_NS = 2_000_000_000
# Of a file as a whole the name is "".
_TABLE = (
    "CREATE TABLE IF NOT EXISTS digests (device INTEGER, inode INTEGER, size INTEGER, modified INTEGER, "
    "changed INTEGER, name TEXT, digest BLOB, PRIMARY KEY (device, inode, size, modified, changed, name)) WITHOUT ROWID"
)
_FIND = "SELECT name, digest FROM digests WHERE (device, inode, size, modified, changed) = (?, ?, ?, ?, ?)"
_KEEP = "INSERT OR REPLACE INTO digests VALUES (?, ?, ?, ?, ?, ?, ?)"


@dataclass(frozen=True)
class FileState:
    """A file as it is at one time. A file that was written to since has another state.

    Attributes:
        settled: the last change was so long ago that every later one has another time.
    """

    path: Path
    device: int
    inode: int
    size: int
    modified: int
    changed: int = field(compare=False)
    settled: bool = field(compare=False)

    @classmethod
    def of(cls, path: Path, descriptor: int | None = None) -> FileState:
        """Return a file's state now, or that of the file which was opened there; times are in nanoseconds."""
        now = os.stat(path if descriptor is None else descriptor)
        settled = time.time_ns() - max(now.st_mtime_ns, now.st_ctime_ns) > _SETTLED_NS
        return cls(path.resolve(), now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns, settled)

    @property
    def numbers(self) -> tuple[int, ...]:
        """What the cache knows the file by."""
        return self.device, self.inode, self.size, self.modified, self.changed


class KnownHashes:
    """Hashes by file.

    A large file counts as unchanged if its device, inode, size, and times of change (mtime and ctime, in nanoseconds)
    are those of the time when it was hashed. A program can set mtime, but not ctime. Only damage below the file system
    goes unseen: see `trust`. Without a cache that can be written, files are hashed in each process.
    """

    def __init__(self) -> None:
        """Know nothing yet; the cache is opened when a large file is asked for."""
        self._here: dict[FileState, str] = {}
        self._trusts_cache = True

    def get(self, state: FileState) -> str | None:
        """Return the hash of a file in this state, if it is known."""
        if state not in self._here and (found := self._cached(state).get("")):
            self._here[state] = found.hex()
        return self._here.get(state)

    def keep(self, state: FileState, digest: str) -> None:
        """Keep the hash of a file, with its state before it was read."""
        self._here[state] = digest
        self.keep_tensors(state, {"": bytes.fromhex(digest)})

    def tensors(self, state: FileState) -> dict[str, bytes]:
        """Return the digests of a large file's tensors that are known, by name."""
        return {name: digest for name, digest in self._cached(state).items() if name}

    def keep_tensors(self, state: FileState, digests: Mapping[str, bytes]) -> None:
        """Keep digests of a file's tensors, with its state before they were read."""
        rows = [(*state.numbers, name, digest) for name, digest in digests.items()]
        if rows and state.size >= LARGE and state.settled:
            _in_cache(lambda table: table.executemany(_KEEP, rows))

    def _cached(self, state: FileState) -> dict[str, bytes]:
        if not self._trusts_cache or state.size < LARGE:
            return {}
        return dict(_in_cache(lambda table: table.execute(_FIND, state.numbers).fetchall()) or ())

    def trust(self, trusted: bool) -> None:
        """Unless what is known is `trusted`, hash every file again in this process."""
        if not trusted:
            self._here.clear()
            self._trusts_cache = False


def _in_cache(work: Callable[[sqlite3.Connection], Found]) -> Found | None:
    """Do some work with the user's cache; None if it cannot be opened, or is damaged or busy."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "rewarded-lines"
    # OverflowError: SQLite's numbers have 63 bits, and some file systems number their files beyond.
    with suppress(OSError, RuntimeError, OverflowError, sqlite3.Error):
        folder.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(folder / "hashes.sqlite", timeout=1)) as table, table:
            table.execute(_TABLE)
            return work(table)
    return None

"""BLAKE3 hashes of files, of a model's weights, and of everything that determines its output; known ones are kept.

This process keeps all of them, and the user's cache those of large files that have not changed.
"""

from __future__ import annotations

import json
import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

import blake3
import numpy as np

from rewarded_lines.checkpoints.adapter_config import read_adapter_config
from rewarded_lines.checkpoints.adapters import is_adapter
from rewarded_lines.checkpoints.headers import TensorInfo, damaged
from rewarded_lines.checkpoints.reader import TensorFiles
from rewarded_lines.errors import fail

_PIECE = 1 << 20
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
    # RuntimeError: a user without a home, as in a container that runs under any number. OverflowError: SQLite's numbers
    # have 63 bits, and some file systems number their files beyond.
    with suppress(OSError, RuntimeError, OverflowError, sqlite3.Error):
        folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "rewarded-lines"
        folder.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(folder / "hashes.sqlite", timeout=1)) as table, table:
            table.execute(_TABLE)
            return work(table)
    return None


KNOWN = KnownHashes()
"""Of all files that this process asks for."""
_WEIGHTS = ("*.safetensors",)
# Beside the weights: architecture and labels, stop tokens, and how text becomes tokens.
_MODEL = (
    *(*_WEIGHTS, "config.json", "adapter_config.json", "generation_config.json"),
    *("tokenizer*.json", "*.model", "chat_template*"),
)


def file_hash(path: Path) -> str:
    """Return the BLAKE3 hash of a file as 64 hex digits; an unchanged file is read only once."""
    state = FileState.of(path)
    if (found := KNOWN.get(state)) is None:
        found = _read_and_hash(path)
        KNOWN.keep(state, found)
    return found


class RunningHashes:
    """Hashes files from the values that a merge reads anyway, if they come in the order of the file."""

    def __init__(self, sources: Iterable[TensorFiles]) -> None:
        """Start with the headers of the files whose hash is not known yet."""
        self._digests: dict[Path, Any] = {}
        self._places: dict[Path, int] = {}
        self._states: dict[Path, FileState] = {}
        for source in sources:
            for file in source.files:
                self._states[file] = FileState.of(file, source.descriptor(file))
                if KNOWN.get(self._states[file]) is None:
                    head = source.header_bytes(file)
                    self._digests[file], self._places[file] = blake3.blake3(head), len(head)

    def take(self, runs: Iterable[tuple[TensorInfo, int, np.ndarray[Any, Any]]]) -> None:
        """Add runs of values, each from a tensor's `start`-th on; a run that the file has not is ignored."""
        for info, start, values in runs:
            place = info.start + start * info.dtype.itemsize
            if self._places.get(info.file) == place and not info.transposed:
                self._digests[info.file].update(values.view(np.uint8).data)
                self._places[info.file] += values.nbytes

    def knows(self, file: Path) -> bool:
        """Return whether the hash of a file is known already, so that its values need not come."""
        return file not in self._digests

    def remember(self) -> None:
        """Keep the hash of each file that was read completely, for `file_hash`; refuse changed files."""
        for file, state in self._states.items():
            if FileState.of(file) != state:
                raise damaged(file, "it changed while it was read")
        for file, place in self._places.items():
            if place == file.stat().st_size:
                KNOWN.keep(self._states[file], self._digests[file].hexdigest())


class TensorDigests:
    """The BLAKE3 digests of tensors in files; those of large files that have not changed are not read again."""

    def __init__(self) -> None:
        """Know nothing yet; a file's digests are looked up when its first tensor is asked for."""
        self._states: dict[Path, FileState] = {}
        self._known: dict[Path, dict[str, bytes]] = {}
        self._new: dict[Path, dict[str, bytes]] = {}
        self._lock = Lock()

    def get(self, source: TensorFiles, info: TensorInfo) -> bytes | None:
        """Return the digest of a source's tensor, if it is known."""
        # Pieces may be in several files, and their whole has none.
        if info.pieces:
            return None
        with self._lock:
            if info.file not in self._states:
                self._states[info.file] = FileState.of(info.file, source.descriptor(info.file))
                self._known[info.file], self._new[info.file] = KNOWN.tensors(self._states[info.file]), {}
            return self._known[info.file].get(_key(info))

    def add(self, info: TensorInfo, digest: bytes) -> None:
        """Add the digest of a tensor that was read after `get` was asked for it."""
        if not info.pieces:
            self._new[info.file][_key(info)] = digest

    def remember(self) -> None:
        """Keep what was added, for other processes; refuse changed files."""
        for file, state in self._states.items():
            if FileState.of(file) != state:
                raise damaged(file, "it changed while it was read")
            KNOWN.keep_tensors(state, self._new[file])
            self._new[file] = {}


def _key(info: TensorInfo) -> str:
    """Return what tells a tensor from the others in its file, and from others made of the same bytes."""
    return json.dumps([info.start, info.bytes, info.transposed and info.shape])


def _read_and_hash(path: Path) -> str:
    """Hash a file in pieces that stay in cache.

    A memory map is a little faster, but counts as resident memory and kills the process if the file is cut short.
    """
    digest = blake3.blake3()
    buffer = memoryview(bytearray(_PIECE))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return str(digest.hexdigest())


def weights_hash(folder: Path) -> str:
    """Return one BLAKE3 hash for a folder's weights: that of the lines `name:hash` of its sorted files.

    Policies keep the hash of the model that they were trained from, so a merge can refuse policies of different models.
    """
    return files_hash(folder, _WEIGHTS)


def policy_hash(folder: Path) -> str:
    """Return one BLAKE3 hash for a policy: its weights and, for an adapter, the settings that it computes with.

    The path of an adapter's base is not part of it.
    """
    weights = weights_hash(folder)
    if not is_adapter(folder):
        return weights
    content = json.dumps([weights, read_adapter_config(folder).computes()], sort_keys=True)
    return blake3.blake3(content.encode()).hexdigest()


def model_hash(folder: Path) -> str:
    """Return one BLAKE3 hash for everything in a model folder that determines its output."""
    weights_hash(folder)
    return files_hash(folder, _MODEL)


def files_hash(folder: Path, patterns: tuple[str, ...]) -> str:
    """Return one BLAKE3 hash for the files of a folder that match the patterns."""
    # Reading a pipe may never end.
    files = sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})
    if not files:
        raise fail("no weights there", where=str(folder), expected=f"a folder with {patterns[0]} files")
    digest = blake3.blake3()
    for path in files:
        digest.update(f"{path.name}:{file_hash(path)}\n".encode())
    return digest.hexdigest()

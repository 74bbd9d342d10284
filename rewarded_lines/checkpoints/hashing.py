"""BLAKE3 hashes of files, of a model's weights, and of everything that determines its output."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from threading import Lock
from typing import Any

import blake3
import numpy as np

from rewarded_lines.checkpoints.adapter_config import read_adapter_config
from rewarded_lines.checkpoints.adapters import is_adapter
from rewarded_lines.checkpoints.headers import TensorInfo, damaged
from rewarded_lines.checkpoints.known_hashes import FileState, KnownHashes
from rewarded_lines.checkpoints.reader import TensorFiles
from rewarded_lines.errors import fail

_PIECE = 1 << 20
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

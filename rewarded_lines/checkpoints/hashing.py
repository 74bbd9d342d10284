"""Names for content: the BLAKE3 hash of a file, of a model folder's weights, and of all that decides what it says."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

import blake3

from rewarded_lines.errors import fail

_PIECE = 1 << 20
_WEIGHTS = ("*.safetensors",)
# Beside the weights: architecture and labels, stop tokens, and how text becomes tokens.
_MODEL = (*_WEIGHTS, "config.json", "generation_config.json", "tokenizer*.json", "*.model", "chat_template*")


def file_hash(path: Path) -> str:
    """Return the BLAKE3 hash of a file as 64 hex digits."""
    status = os.stat(path)
    return _file_hash(path.resolve(), status.st_ino, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=4096)
def _file_hash(path: Path, *status: int) -> str:
    """Hash a file once for as long as its inode, size and time of change stay the same.

    It is read in pieces that stay in cache: a memory map would be a little faster, would count as resident memory,
    and would kill the process if the file were cut short meanwhile.
    """
    digest = blake3.blake3()
    buffer = memoryview(bytearray(_PIECE))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def weights_hash(folder: Path) -> str:
    """Return one BLAKE3 hash for the weights of a model folder, whatever else lies beside them.

    Each `*.safetensors` file, sorted by name, adds the line `name:hash` to it. Policies keep the hash of the model
    they were trained from, so a merge can refuse those that do not share one SFT model.

    Raises:
        UserError: the folder holds no safetensors file.
    """
    return _hash(folder, _WEIGHTS)


def model_hash(folder: Path) -> str:
    """Return one BLAKE3 hash for all in a model folder that decides what it generates or how it scores.

    Raises:
        UserError: the folder holds no safetensors file.
    """
    weights_hash(folder)
    return _hash(folder, _MODEL)


def _hash(folder: Path, patterns: tuple[str, ...]) -> str:
    files = sorted({path for pattern in patterns for path in folder.glob(pattern)})
    if not files:
        raise fail("no weights there", where=str(folder), expected="a folder with *.safetensors files")
    digest = blake3.blake3()
    for path in files:
        digest.update(f"{path.name}:{file_hash(path)}\n".encode())
    return digest.hexdigest()

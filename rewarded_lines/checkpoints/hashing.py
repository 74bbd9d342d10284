"""Names for content: the BLAKE3 hash of a file, and one for all the weights of a model folder."""

from __future__ import annotations

from pathlib import Path

import blake3

from rewarded_lines.errors import fail


def file_hash(path: Path) -> str:
    """Return the BLAKE3 hash of a file as 64 hex digits, read through a memory map on every core."""
    return blake3.blake3(max_threads=blake3.blake3.AUTO).update_mmap(path).hexdigest()


def weights_hash(folder: Path) -> str:
    """Return one BLAKE3 hash for the weights of a model folder, whatever else lies beside them.

    Each `*.safetensors` file, sorted by name, adds the line `name:hash` to it. Policies keep the hash of the
    model they were trained from, so a merge can refuse those that do not share one SFT model.

    Raises:
        UserError: the folder holds no safetensors file.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise fail("no weights there", where=str(folder), expected="a folder with *.safetensors files")
    digest = blake3.blake3()
    for path in files:
        digest.update(f"{path.name}:{file_hash(path)}\n".encode())
    return digest.hexdigest()

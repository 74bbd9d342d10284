"""Safetensors written as a stream: the header first, since every shape is known, then tensor after tensor.

Memory stays at one tensor however large the shards are, which is what the libraries' own `save_file`, taking all
tensors of a file at once, does not give.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import torch

from rewarded_lines.checkpoints.reader import DTYPES, INDEX_FILE, SINGLE_FILE, TensorInfo, total_bytes
from rewarded_lines.errors import fail

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


class CheckpointWriter:
    """Writes tensors, in the order announced, into one or several safetensors files of a folder."""

    def __init__(self, folder: Path, tensors: Sequence[TensorInfo], max_shard_size: int) -> None:
        """Plan the shards.

        Args:
            folder: where the files go; must exist.
            tensors: name, dtype and shape of every tensor; `order` is the order in which to write them.
            max_shard_size: bytes; a tensor larger than that gets a file of its own.
        """
        self._folder = folder
        self._shards = plan_shards(tensors, max_shard_size)
        self.order = [info.name for shard in self._shards for info in shard]
        self._next = 0
        self._shard = -1
        self._left = 0
        self._file: BinaryIO | None = None

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Append the next tensor of `order`."""
        assert name == self.order[self._next], f"expected {self.order[self._next]}, got {name}"
        if self._left == 0:
            self._open_next()
        info = self._shards[self._shard][len(self._shards[self._shard]) - self._left]
        assert (tensor.dtype, tuple(tensor.shape)) == (info.dtype, info.shape), name
        assert self._file is not None
        self._file.write(_as_bytes(tensor))
        self._next += 1
        self._left -= 1

    def close(self) -> None:
        """Finish the last file and write the index when there are several."""
        assert self._next == len(self.order), "not every tensor was written"
        if self._file is not None:
            self._file.close()
        if len(self._shards) > 1:
            weight_map = {info.name: self._name(i) for i, shard in enumerate(self._shards) for info in shard}
            size = sum(total_bytes(shard) for shard in self._shards)
            content = {"metadata": {"total_size": size}, "weight_map": weight_map}
            (self._folder / INDEX_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def _open_next(self) -> None:
        if self._file is not None:
            self._file.close()
        self._shard += 1
        self._left = len(self._shards[self._shard])
        self._file = (self._folder / self._name(self._shard)).open("wb")
        self._file.write(header(self._shards[self._shard]))

    def _name(self, shard: int) -> str:
        count = len(self._shards)
        return SINGLE_FILE if count == 1 else f"model-{shard + 1:05d}-of-{count:05d}.safetensors"


def plan_shards(tensors: Sequence[TensorInfo], max_shard_size: int) -> list[list[TensorInfo]]:
    """Cut `tensors`, in order, into shards of at most `max_shard_size` bytes.

    Within a shard wide types come first, so that every tensor lies at a multiple of its item size.
    """
    shards: list[list[TensorInfo]] = [[]]
    size = 0
    for info in tensors:
        more = total_bytes([info])
        if shards[-1] and size + more > max_shard_size:
            shards.append([])
            size = 0
        shards[-1].append(info)
        size += more
    return [sorted(shard, key=lambda info: -info.dtype.itemsize) for shard in shards]


def header(tensors: Sequence[TensorInfo]) -> bytes:
    """Return the length-prefixed JSON header of a safetensors file that holds `tensors` in this order."""
    content: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for info in tensors:
        end = offset + total_bytes([info])
        content[info.name] = {
            "dtype": _NAMES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def parse_size(text: str) -> int:
    """Return the bytes that "5GB", "500MB" or "1000" mean.

    Raises:
        UserError: it is none of these, or not positive.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?B)?", text.strip().upper())
    size = int(float(match[1]) * _UNITS[match[2] or "B"]) if match else 0
    if size <= 0:
        raise fail("not a size", where="--max-shard-size", expected="for example 5GB or 500MB", got=repr(text))
    return size


def _as_bytes(tensor: torch.Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")

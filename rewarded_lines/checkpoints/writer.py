"""Safetensors written as a stream: headers first, since every shape is known, then blocks of tensors in any order.

Memory stays at one block however large the shards are: safetensors' own `save_file` needs all tensors of a file at
once. Blocks may come from several threads.
"""

from __future__ import annotations

import json
import re
import struct
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from rewarded_lines.checkpoints.headers import TensorInfo
from rewarded_lines.checkpoints.output_file import Buffers, OutputFile
from rewarded_lines.checkpoints.reader import INDEX_FILE, SINGLE_FILE, total_bytes
from rewarded_lines.errors import fail

# Of so many outputs at a time chunks fit the memory; files of more go through the page cache.
_MOST = 16
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


class CheckpointWriter(AbstractContextManager["CheckpointWriter"]):
    """Writes a fixed list of tensors into one or several safetensors files of a folder."""

    def __init__(
        self,
        folder: Path,
        tensors: Sequence[TensorInfo],
        max_shard_size: int = sys.maxsize,
        single_file: str = SINGLE_FILE,
        together: int = 1,
    ) -> None:
        """Create the files in an existing folder, with their headers and at their full length.

        A tensor larger than `max_shard_size` bytes gets a file of its own. `single_file` names the only file.
        `together` says how many writers work at the same time.
        """
        self._folder = folder
        shards = plan_shards(tensors, max_shard_size)
        names = [shard_name(index, len(shards), single_file) for index in range(len(shards))]
        self._infos: dict[str, TensorInfo] = {}
        self._files: dict[Path, OutputFile] = {}
        buffers = Buffers(together) if together <= _MOST else None
        try:
            for name, shard in zip(names, shards, strict=True):
                self._create(folder / name, shard, buffers)
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        if len(shards) > 1:
            weight_map = {info.name: info.file.name for info in self._infos.values()}
            content = {"metadata": {"total_size": total_bytes(tensors)}, "weight_map": weight_map}
            (folder / INDEX_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    @property
    def order(self) -> list[str]:
        """Return the tensors in the order of the files, in which writing is fastest."""
        return list(self._infos)

    def write(self, name: str, start: int, values: np.ndarray[Any, Any]) -> None:
        """Write a run of a tensor's values, in its storage type, from its `start`-th on."""
        info = self._infos[name]
        assert values.dtype == info.dtype.storage and start + values.size <= info.elements, name
        self._files[info.file].write(self._place(info, start), values.view(np.uint8))

    def lend(self, name: str, start: int, count: int) -> list[np.ndarray[Any, Any]] | None:
        """Return memory for a run of a tensor's values, see `OutputFile.lend`."""
        info = self._infos[name]
        lent = self._files[info.file].lend(self._place(info, start), count * info.dtype.itemsize)
        return None if lent is None else [part.view(info.dtype.storage) for part in lent]

    def take_back(self, name: str, start: int, count: int) -> None:
        """Take memory back that was lent and is filled."""
        info = self._infos[name]
        self._files[info.file].take_back(self._place(info, start), count * info.dtype.itemsize)

    @staticmethod
    def _place(info: TensorInfo, start: int) -> int:
        return info.start + start * info.dtype.itemsize

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the files, complete unless there was an error."""
        try:
            for file in self._files.values() if error is None else ():
                file.complete()
        finally:
            while self._files:
                self._files.popitem()[1].close()

    def _create(self, path: Path, shard: Sequence[TensorInfo], buffers: Buffers | None) -> None:
        head = header(shard)
        self._files[path] = OutputFile(path, len(head) + total_bytes(shard), buffers)
        self._files[path].write(0, np.frombuffer(head, np.uint8))
        place = len(head)
        for info in shard:
            self._infos[info.name] = TensorInfo(info.name, info.dtype, info.shape, path, place)
            place += info.bytes


def plan_shards(tensors: Sequence[TensorInfo], max_shard_size: int) -> list[list[TensorInfo]]:
    """Cut `tensors`, in order, into shards of at most `max_shard_size` bytes.

    Within a shard wide types come first, so that every tensor starts at a multiple of its item size.
    """
    shards: list[list[TensorInfo]] = [[]]
    size = 0
    for info in tensors:
        if shards[-1] and size + info.bytes > max_shard_size:
            shards.append([])
            size = 0
        shards[-1].append(info)
        size += info.bytes
    return [sorted(shard, key=lambda info: -info.dtype.itemsize) for shard in shards]


def shard_name(index: int, count: int, single_file: str = SINGLE_FILE) -> str:
    """Return the name of one of `count` weight files."""
    stem, suffix = single_file.rsplit(".", 1)
    return single_file if count == 1 else f"{stem}-{index + 1:05d}-of-{count:05d}.{suffix}"


def header(tensors: Sequence[TensorInfo]) -> bytes:
    """Return the length-prefixed JSON header of a safetensors file that holds `tensors` in this order."""
    content: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for info in tensors:
        end = offset + info.bytes
        content[info.name] = {
            "dtype": info.dtype.name,
            "shape": list(info.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def parse_size(text: str, where: str = "--max-shard-size") -> int:
    """Return the bytes of a size such as "5GB", "500MB" or "1000"; refuse other texts and 0. `where`: the option."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?B)?", text.strip().upper())
    size = int(float(match[1]) * _UNITS[match[2] or "B"]) if match else 0
    if size <= 0:
        raise fail("not a size", where=where, expected="for example 5GB or 500MB", got=repr(text))
    return size

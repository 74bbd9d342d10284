"""Safetensors written as a stream: headers first, since every shape is known, then blocks of tensors in any order.

Memory stays at one block however large the shards are: safetensors' own `save_file` needs all tensors of a file at
once. Blocks may come from several threads.
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from rewarded_lines.checkpoints.headers import TensorInfo
from rewarded_lines.checkpoints.reader import INDEX_FILE, SINGLE_FILE, total_bytes
from rewarded_lines.errors import fail

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
# After so many bytes the kernel starts writing to the disk, so that the sync at the end is short.
_FLUSH = 32 << 20


class CheckpointWriter(AbstractContextManager["CheckpointWriter"]):
    """Writes a fixed list of tensors into one or several safetensors files of a folder."""

    def __init__(
        self, folder: Path, tensors: Sequence[TensorInfo], max_shard_size: int, single_file: str = SINGLE_FILE
    ) -> None:
        """Create the files, with their headers and at their full length.

        Args:
            folder: takes the files; must exist.
            tensors: name, type and shape of every tensor.
            max_shard_size: bytes; a larger tensor gets a file of its own.
            single_file: the name of the file if there is only one.
        """
        self._folder = folder
        shards = plan_shards(tensors, max_shard_size)
        names = [shard_name(index, len(shards), single_file) for index in range(len(shards))]
        self._infos: dict[str, TensorInfo] = {}
        self._descriptors: dict[Path, int] = {}
        for name, shard in zip(names, shards, strict=True):
            self._create(folder / name, shard)
        if len(shards) > 1:
            weight_map = {info.name: info.file.name for info in self._infos.values()}
            content = {"metadata": {"total_size": total_bytes(tensors)}, "weight_map": weight_map}
            (folder / INDEX_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        self._unflushed = 0
        self._begun: dict[int, tuple[int, int]] = {}

    @property
    def order(self) -> list[str]:
        """Return the tensors in the order of the files, in which writing is fastest."""
        return list(self._infos)

    def write(self, name: str, start: int, values: np.ndarray[Any, Any]) -> None:
        """Write a run of a tensor's values, in its storage type, from its `start`-th on."""
        info = self._infos[name]
        assert values.dtype == info.dtype.storage and start + values.size <= info.elements, name
        if not values.size:
            return
        descriptor = self._descriptors[info.file]
        view = values.view(np.uint8).data
        place = info.start + start * info.dtype.itemsize
        while len(view):
            written = os.pwrite(descriptor, view, place)
            view, place = view[written:], place + written
        self._begin_flush(descriptor, place, values.nbytes)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the files."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def _create(self, path: Path, shard: Sequence[TensorInfo]) -> None:
        head = header(shard)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        self._descriptors[path] = descriptor
        os.pwrite(descriptor, head, 0)
        os.ftruncate(descriptor, len(head) + total_bytes(shard))
        place = len(head)
        for info in shard:
            self._infos[info.name] = TensorInfo(info.name, info.dtype, info.shape, path, place)
            place += info.bytes

    def _begin_flush(self, descriptor: int, place: int, more: int) -> None:
        """Ask the kernel now and then to start writing to the disk; the call does not wait.

        POSIX_FADV_DONTNEED starts to write dirty pages and drops clean ones. So each stretch is advised twice, the
        second time together with the next one, and the page cache is left to the inputs.
        """
        self._unflushed += more
        if self._unflushed >= _FLUSH:
            self._unflushed = 0
            before, last = self._begun.get(descriptor, (0, 0))
            if place > before:
                os.posix_fadvise(descriptor, before, place - before, os.POSIX_FADV_DONTNEED)
            self._begun[descriptor] = (last, place)


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

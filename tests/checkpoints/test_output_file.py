"""Large output files: chunks past the page cache, from several threads, in any order."""

import ctypes
import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from rewarded_lines.checkpoints import output_file
from rewarded_lines.checkpoints.dtypes import F32
from rewarded_lines.checkpoints.headers import TensorInfo
from rewarded_lines.checkpoints.output_file import Buffers, OutputFile
from rewarded_lines.checkpoints.writer import CheckpointWriter

CHUNK = 4 * output_file._PAGE
SIZE = 5 * CHUNK + 777


@pytest.fixture(autouse=True)
def small_files_count_as_large(monkeypatch):
    monkeypatch.setattr(output_file, "LARGE", 1)
    monkeypatch.setattr(output_file, "CHUNK", CHUNK)


def fill(file, size=SIZE, lent=False):
    """Write random bytes in pieces of odd lengths, in any order, from four threads; return them."""
    rng = np.random.default_rng(0)
    values = rng.integers(0, 256, size, np.uint8)
    cuts = np.sort(rng.choice(np.arange(1, size), 40, replace=False))
    pieces = list(zip([0, *cuts], [*cuts, size], strict=True))
    rng.shuffle(pieces)

    def write(piece):
        first, last = map(int, piece)
        memory = file.lend(first, last - first) if lent else None
        if memory is None:
            file.write(first, values[first:last])
            return
        for part in memory:
            part[:], first = values[first : first + part.size], first + part.size
        file.take_back(int(piece[0]), last - int(piece[0]))

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(write, pieces))
    file.close()
    return values.tobytes()


@pytest.mark.parametrize("lent", [False, True])
@pytest.mark.parametrize("size", [SIZE, CHUNK, 100])
def test_every_byte_arrives(tmp_path, lent, size):
    file = OutputFile(tmp_path / "out", size, Buffers())
    assert fill(file, size, lent) == (tmp_path / "out").read_bytes()
    assert not file._begun


@pytest.mark.parametrize("fault", ["at opening", "at writing", "no large pages", "no reservation"])
def test_file_systems_that_can_less(tmp_path, monkeypatch, fault):
    real_open, real_write = os.open, output_file._write

    def refuse_to_open(path, flags, *mode):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no")
        return real_open(path, flags, *mode)

    def refuse_to_write(descriptor, place, data):
        if descriptor == file._direct:
            raise OSError(errno.EINVAL, "no")
        real_write(descriptor, place, data)

    if fault == "at opening":
        monkeypatch.setattr(os, "open", refuse_to_open)
    elif fault == "at writing":
        monkeypatch.setattr(output_file, "_write", refuse_to_write)
    elif fault == "no large pages":
        monkeypatch.setattr(output_file.mmap, "MADV_HUGEPAGE", -1)
    else:
        monkeypatch.setattr(output_file, "_fallocate", None)
    file = OutputFile(tmp_path / "out", SIZE, Buffers())
    assert (file._direct < 0) == (fault == "at opening")
    assert fill(file) == (tmp_path / "out").read_bytes()


def test_bytes_that_nobody_writes_are_zero(tmp_path):
    file, values = OutputFile(tmp_path / "out", SIZE, Buffers()), np.zeros(SIZE, np.uint8)
    for first, last in ((10, 20), (CHUNK - 3, CHUNK + 5), (3 * CHUNK, 5 * CHUNK)):
        # Memory that was used before has other bytes.
        file._buffers.give_back(np.full(CHUNK, 7, np.uint8))
        values[first:last] = 1
        file.write(first, values[first:last])
    file.complete()
    file.close()
    assert (tmp_path / "out").read_bytes() == values.tobytes()


def test_a_failed_write_is_told(tmp_path, monkeypatch):
    file = OutputFile(tmp_path / "out", SIZE, Buffers())

    def full(*_):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(output_file, "_write", full)
    with pytest.raises(OSError, match="full"):
        file.write(0, np.zeros(SIZE, np.uint8))
    file.close()


def test_what_the_disk_cannot_hold_is_refused_before_a_byte_is_written(tmp_path):
    with pytest.raises(OSError) as raised:
        OutputFile(tmp_path / "out", 1 << 60, Buffers())
    assert raised.value.errno in (errno.ENOSPC, errno.EFBIG)


def test_a_signal_during_the_reservation_does_no_harm(tmp_path, monkeypatch):
    calls, reserve = [], output_file._fallocate

    def interrupted(*given):
        calls.append(given)
        if len(calls) < 3:
            ctypes.set_errno(errno.EINTR)
            return -1
        return reserve(*given)

    monkeypatch.setattr(output_file, "_fallocate", interrupted)
    OutputFile(tmp_path / "out", SIZE, Buffers()).close()
    assert len(calls) == 3 and (tmp_path / "out").stat().st_size == SIZE


def test_memory_is_used_again(tmp_path):
    buffers = Buffers()
    file = OutputFile(tmp_path / "out", SIZE, buffers)
    for start in range(0, SIZE, 1000):
        file.write(start, np.ones(min(1000, SIZE - start), np.uint8))
    file.close()
    # A piece at the border of two chunks takes both.
    assert len(buffers._free) == 2


def test_many_files_at_a_time_go_through_the_page_cache(tmp_path):
    """Chunks of each would fill the memory."""
    infos = [TensorInfo("w", F32, (CHUNK,), Path("w"), 0)]
    for together, direct in ((16, True), (17, False)):
        (folder := tmp_path / str(together)).mkdir()
        with CheckpointWriter(folder, infos, 1 << 40, together=together) as writer:
            (file,) = writer._files.values()
            assert (file._direct >= 0) == direct

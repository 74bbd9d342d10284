"""Digests of tensors, which order the policies of a sum and seed random masks: kept for files that have not changed."""

import os

import numpy as np
import pytest
from safetensors.numpy import save_file

from rewarded_lines.checkpoints import hashing
from rewarded_lines.checkpoints.dtypes import F32
from rewarded_lines.checkpoints.headers import TensorInfo
from rewarded_lines.checkpoints.reader import TensorFiles
from rewarded_lines.errors import UserError
from rewarded_lines.kernels.norms import Facts


def write(path, last=0.0):
    save_file({name: np.array([1, 2, last], np.float32) for name in "ab"}, path)


def digests(path, monkeypatch, reads=True):
    """Return the digests of both tensors, as another process gets them."""
    monkeypatch.setattr(hashing, "KNOWN", hashing.KnownHashes())
    source = TensorFiles([path])
    monkeypatch.setattr(source, "read_into", source.read_into if reads else None)
    facts = Facts(source, [source], ["a", "b"])
    facts.prepare(facts.digests)
    return [facts.digests(name) for name in "ab"]


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(hashing, "LARGE", 1)
    monkeypatch.setattr(hashing, "_SETTLED_NS", -1)
    write(tmp_path / "one.safetensors")
    return tmp_path / "one.safetensors"


def test_an_unchanged_file_is_not_read_again(path, monkeypatch):
    assert digests(path, monkeypatch) == digests(path, monkeypatch, reads=False)


def test_a_change_is_found_though_size_and_mtime_are_kept(path, monkeypatch):
    before, status = digests(path, monkeypatch), path.stat()
    write(path, last=-0.0)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size
    after = digests(path, monkeypatch)
    assert not set(before) & set(after)


def test_a_file_that_changes_meanwhile_is_refused(path, monkeypatch):
    source = TensorFiles([path])
    facts = Facts(source, [source], ["a", "b"])
    with pytest.raises(UserError, match="it changed while it was read"):
        facts.prepare(lambda name: (facts.digests(name), path.write_bytes(path.read_bytes() + b" ")))


def test_a_file_that_was_replaced_after_it_was_opened_is_refused(path, tmp_path):
    source = TensorFiles([path])
    write(tmp_path / "two.safetensors", last=3.0)
    (tmp_path / "two.safetensors").replace(path)
    facts = Facts(source, [source], ["a", "b"])
    with pytest.raises(UserError, match="it changed while it was read"):
        facts.prepare(facts.digests)


def test_a_tensor_in_pieces_of_two_files_is_always_read(path, tmp_path, monkeypatch):
    """It has no file of its own; the state of one file would not tell of the other."""
    monkeypatch.chdir(tmp_path)
    other, found = tmp_path / "two.safetensors", []
    for last in (3.0, 4.0):
        write(other, last)
        source, more = TensorFiles([path]), TensorFiles([other])
        source.borrow(more, {"c": more.tensors["a"]})
        source.tensors["joined"] = TensorInfo("joined", F32, (6,), pieces=(source.tensors["a"], source.tensors["c"]))
        facts = Facts(source, [source], ["joined"])
        # As an output begins to be written here.
        facts.prepare(lambda name, facts=facts: (facts.digests(name), (tmp_path / "partial").touch()))
        found += facts.digests("joined")
    assert len(set(found)) == 2

"""Hashes of files: from reading them, or from the values that a merge reads."""

import dataclasses
import json
import os
from pathlib import Path

import blake3
import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny_adapters import save_adapter

from rewarded_lines.checkpoints import hashing
from rewarded_lines.checkpoints.hashing import RunningHashes, file_hash, policy_hash, weights_hash
from rewarded_lines.checkpoints.reader import TensorFiles
from rewarded_lines.errors import UserError


def write(path, seed=0):
    rng = np.random.default_rng(seed)
    save_file({name: rng.standard_normal(7).astype(np.float32) for name in "abc"}, path)
    return path


def never(path):
    raise AssertionError("the file was read again")


def pass_by(source, order="abc"):
    hashes = RunningHashes([source])
    for name in order:
        for start, count in ((0, 4), (4, 3)):
            hashes.take([(source.tensors[name], start, source.read(name, start, count))])
    hashes.remember()


def test_what_passes_in_order_need_not_be_read_again(tmp_path, monkeypatch):
    path = write(tmp_path / "one.safetensors")
    pass_by(TensorFiles([path]))
    monkeypatch.setattr(hashing, "_read_and_hash", never)
    assert file_hash(path) == blake3.blake3(path.read_bytes()).hexdigest()


def test_what_passes_out_of_order_or_in_part_is_read(tmp_path):
    for order in ("acb", "ab", "aabc", ""):
        path = write(tmp_path / f"{order or 'none'}.safetensors")
        pass_by(TensorFiles([path]), order)
        assert file_hash(path) == blake3.blake3(path.read_bytes()).hexdigest(), order


def test_a_file_that_changed_is_hashed_anew(tmp_path):
    path = write(tmp_path / "one.safetensors")
    before = file_hash(path)
    write(path, seed=1)
    assert file_hash(path) == blake3.blake3(path.read_bytes()).hexdigest() != before


@pytest.fixture
def processes(tmp_path, monkeypatch):
    """Return a function that forgets what this process knows, as a new process would, and lets files settle."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(hashing, "LARGE", 1)
    monkeypatch.setattr(hashing, "_SETTLED_NS", -1)

    def begin(reads=True):
        monkeypatch.setattr(hashing, "KNOWN", hashing.KnownHashes())
        monkeypatch.setattr(hashing, "_read_and_hash", read if reads else never)

    read = hashing._read_and_hash
    begin()
    return begin


def test_large_files_are_hashed_once_for_all_processes(tmp_path, processes, monkeypatch):
    path = write(tmp_path / "one.safetensors")
    right = blake3.blake3(path.read_bytes()).hexdigest()
    pass_by(TensorFiles([path]))
    processes(reads=False)
    assert file_hash(path) == right and RunningHashes([TensorFiles([path])])._digests == {}
    monkeypatch.setattr(hashing, "LARGE", 1 << 20)
    processes(reads=False)
    with pytest.raises(AssertionError, match="read again"):
        file_hash(path)


@pytest.mark.parametrize("how", ["one byte, times kept", "another file, times kept", "rehash", "just written"])
def test_a_change_is_found_by_another_process(tmp_path, processes, how, monkeypatch):
    path = write(tmp_path / "one.safetensors")
    if how == "just written":
        monkeypatch.setattr(hashing, "_SETTLED_NS", 10**12)
    file_hash(path)
    status, changed = path.stat(), bytearray(path.read_bytes())
    changed[-1] ^= 1
    processes()
    if "times kept" in how:
        place = path if how.startswith("one byte") else tmp_path / "other"
        place.write_bytes(changed)
        place.replace(path)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert file_hash(path) == blake3.blake3(changed).hexdigest()
        return
    # The file looks as before, so only a second reading can tell.
    processes(reads=False)
    if how == "rehash":
        assert file_hash(path)
        hashing.KNOWN.trust(False)
    with pytest.raises(AssertionError, match="read again"):
        file_hash(path)


def test_without_a_cache_files_are_hashed(tmp_path, processes, monkeypatch):
    path = write(tmp_path / "one.safetensors")
    right = blake3.blake3(path.read_bytes()).hexdigest()
    for content in (b"not a database", None):
        folder = tmp_path / "cache" / "rewarded-lines"
        folder.mkdir(parents=True, exist_ok=True)
        if content is None:
            monkeypatch.setenv("XDG_CACHE_HOME", str(path))
        else:
            (folder / "hashes.sqlite").write_bytes(content * 100)
        for _ in range(2):
            processes()
            assert file_hash(path) == right


def test_a_file_that_was_just_written_when_its_reading_began_is_not_kept(tmp_path, processes, monkeypatch):
    """Another write may have had the same time, however long the reading took."""
    path = write(tmp_path / "one.safetensors")
    monkeypatch.setattr(hashing, "_SETTLED_NS", 10**12)
    state = hashing.FileState.of(path)
    monkeypatch.setattr(hashing, "_SETTLED_NS", -1)
    hashing.KNOWN.keep(state, "0" * 64)
    hashing.KNOWN.keep_tensors(state, {"a": b"0"})
    processes()
    assert hashing.KNOWN.get(state) is None and hashing.KNOWN.tensors(state) == {}


def test_a_file_that_was_replaced_after_it_was_opened_is_refused(tmp_path, processes):
    """Else the values of the one would be kept with the name of the other."""
    source = TensorFiles([write(tmp_path / "one.safetensors")])
    write(tmp_path / "two.safetensors", seed=1).replace(tmp_path / "one.safetensors")
    with pytest.raises(UserError, match="it changed while it was read"):
        pass_by(source)


def test_file_systems_may_number_files_beyond_63_bits(tmp_path, processes):
    state = dataclasses.replace(hashing.FileState.of(write(tmp_path / "one.safetensors")), inode=1 << 63)
    hashing.KNOWN.keep(state, "0" * 64)
    hashing.KNOWN.keep_tensors(state, {"a": b"0"})
    processes()
    assert hashing.KNOWN.get(state) is None and hashing.KNOWN.tensors(state) == {}


def test_an_adapter_is_its_scaling_too_and_not_the_path_of_its_base(tmp_path, tiny):
    folder = save_adapter(tiny / "sft", tmp_path / "adapter", 1)
    before, path = policy_hash(folder), folder / "adapter_config.json"
    content = json.loads(path.read_text())
    for change, same in (({"base_model_name_or_path": "elsewhere"}, True), ({"lora_alpha": 60}, False)):
        path.write_text(json.dumps(content | change))
        assert (policy_hash(folder) == before) is same
    assert policy_hash(tiny / "first") == weights_hash(tiny / "first")


def test_the_hash_of_an_adapter_stays_what_runs_have_kept(tmp_path, tiny):
    patterns = {"rank_pattern": {"none": 2}, "alpha_pattern": {"none": 3, "no": 2.5}}
    folder = save_adapter(tiny / "sft", tmp_path / "adapter", 1, **patterns)
    content = json.loads((folder / "adapter_config.json").read_text())
    told = {"rank": content["r"], "alpha": float(content["lora_alpha"]), **patterns}
    told |= {"rslora": False, "fan_in_fan_out": False, "bias": "none", "modules_to_save": []}
    expected = blake3.blake3(json.dumps([weights_hash(folder), told], sort_keys=True).encode()).hexdigest()
    assert policy_hash(folder) == expected


def test_a_user_without_a_home_has_no_cache(monkeypatch):
    """Containers may run under a number that no list of users has."""

    def homeless(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "expanduser", homeless)
    assert hashing._in_cache(lambda table: table) is None

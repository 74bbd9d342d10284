"""Output folders after kills and other accidents."""

import errno
import fcntl
import json
import os
import stat
import threading

import pytest

from rewarded_lines.errors import UserError
from rewarded_lines.folders import atomic_file, atomic_folder, folder_lock, hold_folder, refuse_foreign, write_json


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_whole_or_absent(tmp_path):
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("new")
        assert not (tmp_path / "out").exists()
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["file"]
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "other"):
        raise RuntimeError
    assert names(tmp_path) == ["out"]


def test_what_a_dead_process_left_is_removed_and_what_a_live_one_writes_is_not(tmp_path):
    dead, live = tmp_path / ".out.partial-1", tmp_path / ".out.partial-2"
    dead.mkdir()
    live.mkdir()
    holder = os.open(live, os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)
    with atomic_folder(tmp_path / "out"):
        pass
    os.close(holder)
    assert names(tmp_path) == [".out.partial-2", "out"]


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK])
def test_a_file_system_without_locks_takes_runs_and_merges(tmp_path, monkeypatch, code):
    """Such as Lustre mounted without `flock`. Nobody knows there whether a partial folder is still in use."""

    def refuse(descriptor, operation):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    (tmp_path / ".out.partial-1").mkdir()
    with folder_lock(tmp_path), hold_folder(tmp_path / "run"), atomic_folder(tmp_path / "out"):
        pass
    assert names(tmp_path) == [".lock", ".out.partial-1", "out"]


def test_folders_that_cannot_be_flushed_are_written_all_the_same(tmp_path, monkeypatch):
    """Such as VirtualBox's shared ones; a file that cannot be flushed is a fault."""
    flush, broken = os.fsync, []

    def refuse(descriptor):
        if broken or stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "file").touch()
    assert names(tmp_path / "out") == ["file"]
    broken.append(True)
    with pytest.raises(OSError, match="Invalid argument"), atomic_folder(tmp_path / "other") as folder:
        (folder / "file").touch()
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("finished", [False, True])
def test_a_replacement_cut_short_is_mended(tmp_path, finished):
    """After a kill between the two renames the old folder returns; after both it is removed."""
    (tmp_path / ".out.replaced").mkdir()
    (tmp_path / ".out.replaced/old").write_text("old")
    if finished:
        (tmp_path / "out").mkdir()
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "out", overwrite=True):
        raise RuntimeError
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ([] if finished else ["old"])


def test_an_output_made_meanwhile_stays(tmp_path):
    with pytest.raises(UserError, match="meanwhile"), atomic_folder(tmp_path / "out") as folder:
        (folder / "mine").touch()
        (tmp_path / "out").mkdir()
        (tmp_path / "out/theirs").touch()
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["theirs"]


def test_foreign_folders(tmp_path):
    refuse_foreign(tmp_path / "absent", "run.json")
    (tmp_path / "file").touch()
    for place in (tmp_path, tmp_path / "file"):
        with pytest.raises(UserError):
            refuse_foreign(place, "run.json")
    (tmp_path / "run.json").touch()
    refuse_foreign(tmp_path, "run.json")


@pytest.mark.parametrize("swaps", [True, False])
def test_a_folder_that_is_replaced_is_never_absent(tmp_path, monkeypatch, swaps):
    """Without a swap of folders there is a moment without either; the next run repairs it."""
    if not swaps:
        monkeypatch.setattr("rewarded_lines.folders._swap", lambda first, second: False)
    out, over, absent = tmp_path / "out", threading.Event(), []

    def watch():
        while not over.is_set():
            absent.append(not os.path.exists(out))

    out.mkdir()
    watcher = threading.Thread(target=watch)
    watcher.start()
    for number in range(20):
        with atomic_folder(out, overwrite=True) as folder:
            (folder / str(number)).touch()
        assert names(tmp_path) == ["out"] and names(out) == [str(number)]
    over.set()
    watcher.join()
    assert not (swaps and any(absent))


def test_parents_that_were_made_go_with_what_was_to_be_in_them(tmp_path):
    (tmp_path / "there").mkdir()
    for out in (tmp_path / "there/new/deep/out", tmp_path / "there/new" / ("n" * 250)):
        with pytest.raises((RuntimeError, OSError)), atomic_folder(out):
            raise RuntimeError
    assert names(tmp_path) == ["there"] and names(tmp_path / "there") == []


def test_a_file_is_replaced_whole_or_stays(tmp_path):
    path = tmp_path / "new" / "a.json"
    write_json(path, {"λ": "\udce9"})
    assert path.read_text(encoding="utf-8") == '{\n  "λ": "\\udce9"\n}\n'
    with pytest.raises(RuntimeError), atomic_file(path) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert json.loads(path.read_text(encoding="utf-8")) == {"λ": "\udce9"} and os.listdir(path.parent) == ["a.json"]

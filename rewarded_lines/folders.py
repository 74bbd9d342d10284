"""Output folders that are complete or absent: built beside their place under another name, synced, renamed."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rewarded_lines.errors import Problem, fail

_LOCK = ".lock"


def existing_output(out: Path, overwrite: bool) -> list[Problem]:
    """Return the problem of an output that is already there, if it is one."""
    if overwrite or not out.exists():
        return []
    return [
        Problem(
            "the output folder exists",
            where=str(out),
            remedy="pass --overwrite to replace it, or another --out",
        )
    ]


@contextmanager
def atomic_folder(out: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty folder that becomes `out` when the block ends well, and vanishes when it does not.

    Args:
        out: the folder to make; its parents are made too.
        overwrite: replace a folder that is there, only once the new one is whole.

    Raises:
        UserError: `out` exists, or another process made it meanwhile; nothing is changed then.
    """
    if problems := existing_output(out, overwrite):
        raise fail(problems[0].what, where=problems[0].where, remedy=problems[0].remedy)
    out.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(out)
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    partial.mkdir()
    try:
        yield partial
        sync_folder(partial)
        _put_in_place(partial, out, overwrite)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def refuse_foreign(folder: Path, mark: str) -> None:
    """Refuse a folder that holds something other than a run of ours, which is known by the file `mark`.

    Raises:
        UserError: there are entries, but neither `mark` nor the lock that a run takes first.
    """
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if folder.exists() and not folder.is_dir():
        raise fail("a file stands where the run folder should be", where=str(folder), remedy="pass another --out")
    if names and not names & {mark, _LOCK}:
        raise fail(
            "the folder holds something else",
            where=str(folder),
            expected=f"an empty folder, or one with {mark}",
            got=", ".join(sorted(names)[:5]),
            remedy="pass another --out",
        )


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process; the lock goes with the process, however it ends.

    Raises:
        UserError: another process holds it.
    """
    with (folder / _LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise fail(
                "another process is at work in this folder",
                where=str(folder),
                remedy="wait for it to finish, or name another folder with --out",
            ) from error
        yield


def sync_folder(folder: Path) -> None:
    """Flush every file below `folder`, and the folders themselves, to the disk."""
    for directory, _, files in os.walk(folder):
        for path in [*(Path(directory, name) for name in files), Path(directory)]:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _put_in_place(partial: Path, out: Path, overwrite: bool) -> None:
    replaced = out.with_name(f".{out.name}.replaced-{os.getpid()}")
    if overwrite and out.exists():
        os.rename(out, replaced)
    try:
        os.rename(partial, out)
    except OSError as error:
        raise fail(
            "another process made the output folder meanwhile", where=str(out), remedy="pass another --out"
        ) from error
    if replaced.is_dir():
        shutil.rmtree(replaced)
    else:
        replaced.unlink(missing_ok=True)


def _remove_abandoned(out: Path) -> None:
    """Remove what killed runs left half-written for this same output."""
    for leftover in out.parent.glob(f".{out.name}.partial-*"):
        if not _alive(leftover.name.rpartition("-")[2]):
            shutil.rmtree(leftover, ignore_errors=True)


def _alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return True

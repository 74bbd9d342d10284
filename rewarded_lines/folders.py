"""Output folders and files that are complete or absent: written under another name beside their place, then renamed."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import glob
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rewarded_lines.errors import Problem, UserError, fail

TRAINING_FILE = "training.json"
"""How a recipe made the model in the same folder."""
METRICS_FILE = "metrics.jsonl"
"""The trainer's log of the model in the same folder, in JSON lines."""
_LOCK = ".lock"
_TAKEN = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR)
_RENAME_EXCHANGE = 2
# What file systems without locks answer, such as Lustre mounted without `flock`, or NFS without its lock service.
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


def unfinished(output: Path) -> Path:
    """Return the folder in which a recipe works until `output` is complete."""
    return output.with_name(f"{output.name}.unfinished")


def existing_output(out: Path, overwrite: bool, mark: str = "") -> list[Problem]:
    """Return the problem of an output that exists already or cannot be made, if there is one.

    Folders without the file `mark` are never replaced. A link may be replaced: the folder behind it stays.
    """
    where = str(out)
    if out.name in ("", ".."):
        # No folder can be renamed to these.
        return [Problem("not a name for a new folder", where, remedy="pass another --out")]
    if not os.path.lexists(out):
        return []
    if not overwrite:
        return [Problem("the output folder exists", where, remedy="pass --overwrite to replace it, or another --out")]
    if not mark or out.is_symlink() or (out.is_dir() and ((out / mark).is_file() or not any(out.iterdir()))):
        return []
    what, remedy = "--overwrite replaces only outputs of this command", "remove it yourself, or pass another --out"
    return [Problem(what, where, f"a folder with {mark}, or an empty one", remedy=remedy)]


@contextmanager
def atomic_folder(out: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty folder that becomes `out` if the block succeeds, and is removed if it fails.

    Parents are made, too. With `overwrite`, the complete new folder replaces an existing one.

    Raises:
        UserError: `out` exists, or another process made it meanwhile; nothing has changed.
    """
    if problems := existing_output(out, overwrite):
        raise UserError(problems)
    with scratch_folder(out) as partial:
        yield partial
        publish_folder(partial, out, overwrite)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield the name of a file beside `path` that replaces it at the end: readers see the old or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write an indented JSON file, complete or not at all."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    # Surrogates, for example from a file's name, become JSON escapes.
    write_bytes(path, text.encode("utf-8", errors="backslashreplace"))


def json_object_in(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; {} if the file is missing, damaged or holds something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file, complete or not at all."""
    with atomic_file(path) as partial:
        partial.write_bytes(content)


def publish_folder(folder: Path, out: Path, overwrite: bool) -> None:
    """Flush a finished folder to the disk, then rename it to `out` beside it."""
    for directory, _, files in os.walk(folder):
        for name in (*files, ""):
            _sync(Path(directory, name))
    with locked(out.parent):
        _put_in_place(folder, out, overwrite)
        # The new name must be on the disk before the old folder is removed.
        _sync(out.parent)
    # After a swap, the old folder has this name.
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def hold_folder(folder: Path) -> Iterator[None]:
    """Keep other processes from making `folder`, which need not exist, until the block or this process ends."""
    held = folder.with_name(f".{folder.name}.lock")
    with _parents(folder), folder_lock(folder, held):
        try:
            yield
        finally:
            held.unlink(missing_ok=True)


@contextmanager
def folder_lock(folder: Path, lock: Path | None = None) -> Iterator[None]:
    """Hold a folder until the block or this process ends, by its lock file, by default one in the folder.

    On a file system without locks, nothing is held, and two processes may work there.
    """
    lock = lock or folder / _LOCK
    with lock.open("w") as file:
        try:
            _flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Its last holder may have removed the file between the two calls.
            if not os.path.samestat(os.fstat(file.fileno()), lock.stat()):
                raise BlockingIOError
        except OSError as error:
            what, remedy = "another process is at work in this folder", "wait for it to finish, or name another folder"
            raise fail(what, where=str(folder), remedy=remedy) from error
        yield


@contextmanager
def scratch_folder(out: Path) -> Iterator[Path]:
    """Yield an empty folder beside `out`, removed at the end of the block or, after a kill, by the next call."""
    partial = out.with_name(f".{out.name}.partial-{secrets.token_hex(4)}")
    with _parents(out):
        with locked(out.parent):
            _clean_up(out)
            partial.mkdir()
            # Locked while this process lives: a folder that can be locked was left by a dead one.
            holder = _lock(partial, wait=False)
        try:
            yield partial
        finally:
            os.close(holder)
            shutil.rmtree(partial, ignore_errors=True)


def refuse_foreign(folder: Path, mark: str) -> None:
    """Refuse a folder that is not empty and has neither the file `mark` of a run nor a run's lock."""
    if folder.exists() and not folder.is_dir():
        raise fail("a file is in the place of the run folder", where=str(folder), remedy="pass another --out")
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if names and not names & {mark, _LOCK}:
        what, expected = "the folder holds something else", f"an empty folder, or one with {mark}"
        got, remedy = ", ".join(sorted(names)[:5]), "pass another --out"
        raise fail(what, where=str(folder), expected=expected, got=got, remedy=remedy)


def refusal(folder: Path) -> str:
    """Return why no file can be made in a folder, or in the nearest above it that exists; "" if one can."""
    try:
        tempfile.TemporaryFile(dir=existing(folder)).close()
    except OSError as error:
        return error.strerror or type(error).__name__
    return ""


def existing(path: Path) -> Path:
    """Return the path, or the nearest above it that exists."""
    path = path.absolute()
    return next(place for place in (path, *path.parents) if place.exists())


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems cannot flush folders: PostgreSQL's `fsync_fname` ignores the same two errors.
        if not path.is_dir() or error.errno not in (errno.EBADF, errno.EINVAL):
            raise
    finally:
        os.close(descriptor)


@contextmanager
def _parents(out: Path) -> Iterator[None]:
    """Make the folders above `out`; at the end remove the new ones that are empty."""
    made = [parent for parent in out.absolute().parents if not parent.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        with suppress(OSError):
            for parent in made:
                parent.rmdir()


def _put_in_place(partial: Path, out: Path, overwrite: bool) -> None:
    """Rename `partial` to `out`; remove the folder that had the name last."""
    if overwrite and out.is_dir() and not out.is_symlink() and _swap(partial, out):
        return
    replaced = out.with_name(f".{out.name}.replaced")
    if overwrite and os.path.lexists(out):
        os.rename(out, replaced)
    try:
        os.rename(partial, out)
    except OSError as error:
        if os.path.lexists(replaced):
            os.rename(replaced, out)
        if error.errno not in _TAKEN:
            raise
        what = "another process made the output folder meanwhile"
        raise fail(what, where=str(out), remedy="pass another --out") from error
    remove(replaced)


def _swap(first: Path, second: Path) -> bool:
    """Swap two folders in one step that a kill cannot interrupt; return False if the system cannot."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    names = os.fsencode(os.path.abspath(first)), os.fsencode(os.path.abspath(second))
    return renameat2 is not None and renameat2(-1, names[0], -1, names[1], _RENAME_EXCHANGE) == 0


def _clean_up(out: Path) -> None:
    """Remove what killed processes left of this output, and undo an interrupted replacement."""
    replaced = out.with_name(f".{out.name}.replaced")
    if os.path.lexists(replaced) and not os.path.lexists(out):
        os.rename(replaced, out)
    remove(replaced)
    for leftover in out.parent.glob(f".{glob.escape(out.name)}.partial-*"):
        try:
            holder = _lock(leftover, wait=False, surely=True)
        except (BlockingIOError, FileNotFoundError):
            # Perhaps still in use, or already removed.
            continue
        shutil.rmtree(leftover, ignore_errors=True)
        os.close(holder)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with all that is in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Wait for a lock on this folder, and hold it for the block."""
    descriptor = _lock(folder, wait=True)
    try:
        yield
    finally:
        os.close(descriptor)


def _lock(folder: Path, wait: bool, surely: bool = False) -> int:
    """Return a descriptor that locks the folder until it is closed; without `wait`, may raise BlockingIOError.

    With `surely`, it is raised for a folder that cannot be locked, too.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if not _flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB)) and surely:
            raise BlockingIOError
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _flock(descriptor: int, operation: int) -> bool:
    """Lock an open file or folder; return False if its file system has no locks."""
    try:
        fcntl.flock(descriptor, operation)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return False
    return True

"""Scores that are kept: one SQLite file, in which a kill at any time leaves what was put there before."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import blake3

from rewarded_lines.errors import fail
from rewarded_lines.rewards.score_checks import Pair

_T = TypeVar("_T")
# The table's name holds the version of its keys.
_TABLE = "CREATE TABLE IF NOT EXISTS scores_1 (pair BLOB PRIMARY KEY, score REAL NOT NULL) WITHOUT ROWID"
_ASKED_AT_ONCE = 500
_PATIENCE = 60.0
"""Seconds to wait for another process that writes to the same file."""


class ScoreCache:
    """Scores by the hash of (key of the reward, prompt, response), to full precision.

    SQLite's default journal is used: it is as safe as its write-ahead log, and works on network drives, too. Several
    processes may share a file. A file that is damaged is put aside, and a new one begun.
    """

    def __init__(self, path: Path | None = None) -> None:
        """Open or make the file.

        Args:
            path: the file; None keeps scores in memory.

        Raises:
            UserError: the file cannot be opened or made.
        """
        self.path = path
        if path is not None:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise fail("the folder cannot be made", where=str(path.parent), got=str(error)) from error
        self._connection: sqlite3.Connection | None = None
        self._run(lambda connection: None)

    def get(self, key: str, pairs: Sequence[Pair]) -> dict[Pair, float]:
        """Return the scores that are known of `pairs`.

        Args:
            key: the reward's, see `reward_key`.
            pairs: prompts and responses.

        Raises:
            UserError: the file cannot be read.
        """
        by_hash = {_hash(key, pair): pair for pair in pairs}
        found = self._run(lambda connection: dict(_select(connection, list(by_hash))))
        return {pair: found[hashed] for hashed, pair in by_hash.items() if hashed in found}

    def put(self, key: str, scores: Mapping[Pair, float]) -> None:
        """Keep `scores` of a reward, all of them or, if this is killed, none.

        Raises:
            UserError: the file cannot be written.
        """
        rows = [(_hash(key, pair), score) for pair, score in scores.items()]
        self._run(lambda connection: _insert(connection, rows))

    def close(self) -> None:
        """Close the file; scores in memory are gone."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def __enter__(self) -> ScoreCache:
        """Return the cache, closed at the end of the block."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Close the file."""
        self.close()

    def _run(self, task: Callable[[sqlite3.Connection], _T]) -> _T:
        """Do `task`, a second time on a new file if this one turns out to be damaged."""
        try:
            try:
                return task(self._open())
            except sqlite3.DatabaseError as error:
                # The damaged file is one that exists; other faults (disk full, no permission) have a class below this.
                if type(error) is not sqlite3.DatabaseError or self.path is None:
                    raise
            self.close()
            _put_aside(self.path)
            return task(self._open())
        except (sqlite3.Error, OSError) as error:
            raise fail("the score cache cannot be used", where=str(self.path), got=str(error)) from error

    def _open(self) -> sqlite3.Connection:
        if self._connection is None:
            self._connection = sqlite3.connect(self.path or ":memory:", timeout=_PATIENCE)
            with self._connection:
                self._connection.execute(_TABLE)
        return self._connection


def _hash(key: str, pair: Pair) -> bytes:
    """Return a hash under which no two (key, prompt, response) meet; lone surrogates in texts are as good as others."""
    parts = [part.encode("utf-8", "surrogatepass") for part in (key, *pair)]
    lengths = ",".join(str(len(part)) for part in parts)
    return blake3.blake3(lengths.encode() + b"\n" + b"".join(parts)).digest()


def _select(connection: sqlite3.Connection, hashes: Sequence[bytes]) -> Iterator[tuple[bytes, float]]:
    for start in range(0, len(hashes), _ASKED_AT_ONCE):
        some = hashes[start : start + _ASKED_AT_ONCE]
        marks = ",".join("?" * len(some))
        yield from connection.execute(f"SELECT pair, score FROM scores_1 WHERE pair IN ({marks})", some)


def _insert(connection: sqlite3.Connection, rows: Sequence[tuple[bytes, float]]) -> None:
    with connection:
        connection.executemany("INSERT OR REPLACE INTO scores_1 VALUES (?, ?)", rows)


def _put_aside(path: Path) -> None:
    """Rename a damaged file; its journal would be taken for the new one's."""
    number = 1
    while (aside := path.with_name(f"{path.name}.damaged-{number}")).exists():
        number += 1
    path.rename(aside)
    for ending in ("-journal", "-wal", "-shm"):
        with contextlib.suppress(FileNotFoundError):
            path.with_name(path.name + ending).rename(aside.with_name(aside.name + ending))

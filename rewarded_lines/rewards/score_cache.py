"""Keeps scores in one SQLite file. A kill at any time loses nothing that was put there before."""

from __future__ import annotations

import contextlib
import math
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import blake3

from rewarded_lines.errors import fail
from rewarded_lines.rewards.score_checks import Pair

_T = TypeVar("_T")
# The table's name holds the version of its keys.
_TABLE = "CREATE TABLE IF NOT EXISTS scores_1 (pair BLOB PRIMARY KEY, score REAL NOT NULL) WITHOUT ROWID"
# A REAL cannot be NaN: these pairs have no score, since the reward abstained.
_ABSTAINED = "CREATE TABLE IF NOT EXISTS abstained_1 (pair BLOB PRIMARY KEY) WITHOUT ROWID"
_HASHES_PER_QUERY = 500
# Seconds to wait while another process writes to the file.
_TIMEOUT = 60.0


class ScoreCache:
    """Scores by the hash of (key of the reward, prompt, response, columns that it reads), in full precision.

    SQLite's default journal is as safe as its write-ahead log, and also works on network drives. Several processes may
    share a file. A damaged file is renamed, and a new one begun.
    """

    def __init__(self, path: Path | None = None) -> None:
        """Open or create the file; without a path, keep the scores in memory."""
        self.path = path
        self._connection: sqlite3.Connection | None = None
        self._run(lambda connection: None)

    def get(self, key: str, pairs: Sequence[Pair]) -> dict[Pair, float]:
        """Return the known scores of `pairs`; `key` is the reward's, see `reward_key`."""
        by_hash = {_hash(key, pair): pair for pair in pairs}
        found = self._run(lambda connection: dict(_select(connection, list(by_hash))))
        return {pair: found[hashed] for hashed, pair in by_hash.items() if hashed in found}

    def put(self, key: str, scores: Mapping[Pair, float]) -> None:
        """Keep the scores of a reward; after a kill, the file holds all of them or none."""
        rows = [(_hash(key, pair), score) for pair, score in scores.items() if not math.isnan(score)]
        abstained = [(_hash(key, pair),) for pair, score in scores.items() if math.isnan(score)]

        def insert(connection: sqlite3.Connection) -> None:
            with connection:
                connection.executemany("INSERT OR REPLACE INTO scores_1 VALUES (?, ?)", rows)
                connection.executemany("INSERT OR REPLACE INTO abstained_1 VALUES (?)", abstained)

        self._run(insert)

    def close(self) -> None:
        """Close the file; scores in memory are lost."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _run(self, task: Callable[[sqlite3.Connection], _T]) -> _T:
        """Run `task`, and if the file is damaged, run it again on a new file."""
        try:
            try:
                return task(self._open())
            except sqlite3.DatabaseError as error:
                # Damage raises this class itself, other faults (disk full, no permission) a subclass.
                if type(error) is not sqlite3.DatabaseError or self.path is None:
                    raise
            self.close()
            _rename_damaged(self.path)
            return task(self._open())
        except (sqlite3.Error, OSError) as error:
            raise fail("the score cache cannot be used", where=str(self.path), got=str(error)) from error

    def _open(self) -> sqlite3.Connection:
        if self._connection is None:
            if self.path is not None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            # Several threads may use it, one at a time.
            self._connection = sqlite3.connect(self.path or ":memory:", timeout=_TIMEOUT, check_same_thread=False)
            with self._connection:
                self._connection.execute(_TABLE)
                self._connection.execute(_ABSTAINED)
        return self._connection


def _hash(key: str, pair: Pair) -> bytes:
    """Return a hash of key and pair; lone surrogates are allowed."""
    parts = [part.encode("utf-8", "surrogatepass") for part in (key, *pair)]
    # The lengths tell ("ab", "c") from ("a", "bc").
    lengths = ",".join(str(len(part)) for part in parts)
    return blake3.blake3(lengths.encode() + b"\n" + b"".join(parts)).digest()


def _select(connection: sqlite3.Connection, hashes: Sequence[bytes]) -> Iterator[tuple[bytes, float]]:
    for start in range(0, len(hashes), _HASHES_PER_QUERY):
        some = hashes[start : start + _HASHES_PER_QUERY]
        marks = ",".join("?" * len(some))
        yield from connection.execute(f"SELECT pair, score FROM scores_1 WHERE pair IN ({marks})", some)
        for (pair,) in connection.execute(f"SELECT pair FROM abstained_1 WHERE pair IN ({marks})", some):
            yield pair, math.nan


def _rename_damaged(path: Path) -> None:
    """Rename a damaged file with its journals; SQLite would apply an old journal to the new file."""
    number = 1
    while (aside := path.with_name(f"{path.name}.damaged-{number}")).exists():
        number += 1
    path.rename(aside)
    for ending in ("-journal", "-wal", "-shm"):
        with contextlib.suppress(FileNotFoundError):
            path.with_name(path.name + ending).rename(aside.with_name(aside.name + ending))

"""The cache returns exact scores for equal pairs only, also after a kill or damage."""

import os
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewarded_lines.errors import UserError
from rewarded_lines.rewards.score_cache import ScoreCache

TEXT = st.text(st.characters(codec=None))
FLOATS = st.floats(allow_nan=False, allow_infinity=False)


@given(st.dictionaries(st.tuples(TEXT, TEXT), FLOATS, max_size=20))
def test_what_is_put_comes_back_exactly(scores):
    with closing(ScoreCache()) as cache:
        cache.put("key", scores)
        assert cache.get("key", [*scores, ("no such", "pair")]) == {**scores, **cache.get("key", [("no such", "pair")])}
        assert cache.get("other", list(scores)) == {}


def test_pairs_are_told_apart_by_where_they_are_cut():
    with closing(ScoreCache()) as cache:
        cache.put("k", {("ab", "c"): 1.0, ("a", "bc"): 2.0, ("", "abc"): 3.0, ("abc", ""): 4.0})
        cache.put("ka", {("b", "c"): 5.0})
        assert cache.get("k", [("a", "bc"), ("abc", ""), ("ab", "c"), ("b", "c")]) == {
            ("ab", "c"): 1.0,
            ("a", "bc"): 2.0,
            ("abc", ""): 4.0,
        }


def test_many_are_found_at_once_and_again_after_closing(tmp_path):
    path = tmp_path / "deep" / "scores.sqlite"
    scores = {(f"p{index}", "r"): index / 3 for index in range(1700)}
    with closing(ScoreCache(path)) as cache:
        cache.put("k", scores)
    with closing(ScoreCache(path)) as cache:
        assert cache.get("k", list(scores)) == scores
        cache.put("k", {("p1", "r"): 7.0})
        assert cache.get("k", [("p1", "r")]) == {("p1", "r"): 7.0}


def test_two_processes_share_a_file(tmp_path):
    with closing(ScoreCache(tmp_path / "s")) as one, closing(ScoreCache(tmp_path / "s")) as other:
        one.put("k", {("a", "b"): 1.0})
        other.put("k", {("c", "d"): 2.0})
        assert one.get("k", [("c", "d")]) == {("c", "d"): 2.0}


@pytest.mark.parametrize("damage", ["text", "cut", "overwritten"])
def test_a_damaged_file_is_put_aside_and_a_new_one_begun(tmp_path, damage):
    path = tmp_path / "scores.sqlite"
    scores = {(f"p{index}", "r" * 50): 0.1 for index in range(2000)}
    with closing(ScoreCache(path)) as cache:
        cache.put("k", scores)
    content = path.read_bytes()
    path.write_bytes(
        {"text": b"not a database, " * 100, "cut": content[:5000], "overwritten": content[:4096] + b"\xff" * 60000}[
            damage
        ]
    )
    with closing(ScoreCache(path)) as cache:
        assert cache.get("k", list(scores)) == {}
        cache.put("k", scores)
        assert cache.get("k", list(scores)) == scores
    assert [file.name for file in tmp_path.iterdir() if "damaged" in file.name] == ["scores.sqlite.damaged-1"]


def test_damage_that_shows_while_it_is_open_is_mended_too(tmp_path):
    path = tmp_path / "scores.sqlite"
    with closing(ScoreCache(path)) as cache:
        cache.put("k", {("a", "b"): 1.0})
        path.write_bytes(b"something else entirely" * 1000)
        cache.put("k", {("c", "d"): 2.0})
        assert cache.get("k", [("c", "d")]) == {("c", "d"): 2.0}


def test_files_that_cannot_be_used_are_said_to_be(tmp_path):
    with pytest.raises(UserError, match="score cache cannot be used"):
        ScoreCache(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="(?s)score cache cannot be used.*file"):
        ScoreCache(tmp_path / "file" / "scores")
    other = sqlite3.connect(tmp_path / "other")
    other.execute("CREATE TABLE scores_1 (something TEXT)")
    other.close()
    with closing(ScoreCache(tmp_path / "other")) as cache, pytest.raises(UserError, match="no such column"):
        cache.get("k", [("a", "b")])


WRITER = """\
import sys
from pathlib import Path
from rewarded_lines.rewards.score_cache import ScoreCache

cache = ScoreCache(Path("scores"))
for chunk in range(100000):
    cache.put("k", {(f"{chunk}-{index}", "r"): chunk + index / 7 for index in range(100)})
    sys.stdout.write(f"{chunk}\\n")
    sys.stdout.flush()
"""


def test_a_kill_keeps_every_chunk_that_was_put(tmp_path):
    kept = -1
    for round_ in range(4):
        (tmp_path / "scores").unlink(missing_ok=True)
        with (tmp_path / "log").open("wb") as log:
            process = subprocess.Popen([sys.executable, "-c", WRITER], cwd=tmp_path, stdout=log)
            while not (tmp_path / "log").stat().st_size:
                time.sleep(0.01)
            time.sleep(0.05 * round_ + 0.013)
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        done = [line for line in (tmp_path / "log").read_text().splitlines(keepends=True) if line.endswith("\n")]
        kept = int(done[-1])
        with closing(ScoreCache(tmp_path / "scores")) as cache:
            pairs = {(f"{chunk}-{i}", "r"): chunk + i / 7 for chunk in range(kept + 1) for i in range(100)}
            assert cache.get("k", list(pairs)) == pairs
            after = cache.get("k", [(f"{kept + 1}-{index}", "r") for index in range(100)])
            assert len(after) in (0, 100)
    assert kept >= 0 and not list(tmp_path.glob("*damaged*"))

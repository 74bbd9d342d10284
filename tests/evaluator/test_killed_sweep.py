"""Sweeps that die by SIGKILL, Ctrl-C or a full disk, and are continued."""

import errno
import io
import multiprocessing
import os
import random
import resource
import signal
import time

import command
import pyarrow.parquet as pq
import pytest
from run_records import contents

from rewarded_lines import sweep
from rewarded_lines.errors import UserError
from rewarded_lines.evaluator import records
from rewarded_lines.evaluator.records import load_run

PAUSE = 0.03
WRITE_TABLE = pq.write_table
SWEEP = ("sweep", "--engine", "hf", "--points", "11", "--out", "run")
# What the parent has loaded is there already, so that kills fall on the sweep and not on imports.
FORK = multiprocessing.get_context("fork")


def run_in_child(folder, out):
    os.chdir(folder)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    records.pq.write_table = write_slowly
    sweep(engine="hf", points=3, out=out)


def write_slowly(table, path):
    """Write a record slowly, so that most kills hit a write or the time between two."""
    WRITE_TABLE(table, buffer := io.BytesIO())
    content = buffer.getvalue()
    path.write_bytes(content[: len(content) // 2])
    time.sleep(PAUSE)
    path.write_bytes(content)
    time.sleep(PAUSE)


@pytest.mark.slow
@pytest.mark.parametrize("wanted", [40])
def test_sigkill_at_random_moments_leaves_a_run_that_ends_as_if_nothing_had_been(tiny, wanted):
    # Six prompts: what is killed is the writing, not the generation.
    rows = (tiny / "test.jsonl").read_text().splitlines(keepends=True)
    (tiny / "test.jsonl").write_text("".join(rows[:6]))
    # Import everything here, and see how long an uninterrupted sweep takes in a child.
    sweep(engine="hf", points=3, out="whole")
    began = time.perf_counter()
    child = FORK.Process(target=run_in_child, args=(tiny, "timed"))
    child.start()
    child.join()
    assert child.exitcode == 0
    span = time.perf_counter() - began
    expected = contents(tiny / "whole")
    assert contents(tiny / "timed") == expected
    chance, kills, states, number = random.Random(0), 0, set(), 0
    for _ in range(4 * wanted):
        out = f"killed-{number}"
        child = FORK.Process(target=run_in_child, args=(tiny, out))
        child.start()
        child.join(timeout=chance.uniform(0, 1.2 * span))
        if child.is_alive():
            os.kill(child.pid, signal.SIGKILL)
            kills += 1
        child.join()
        points, drafts = (list((tiny / out / name).glob("*.parquet")) for name in ("points", "drafts"))
        states.add((len(points), len(drafts)))
        assert all(pq.read_table(path).to_pydict() == expected[path.name] for path in points)
        # Once all points are there, the next kills fall on another run.
        number += len(points) == len(expected)
        if kills == wanted:
            break
    assert kills == wanted and len(states) > 1, (kills, states, number, span)
    for out in (f"killed-{one}" for one in range(number + 1)):
        run = sweep(engine="hf", points=3, out=out)
        assert run.header["complete"] and contents(tiny / out) == expected
        left = {path.name for path in (tiny / out).iterdir()}
        assert left <= {"run.json", "points", "drafts", ".lock", "scores.sqlite"}
        assert not list((tiny / out / "drafts").glob("*.parquet"))


def test_what_a_kill_left_half_written_goes(swept):
    whole = contents(swept / "sweep")
    for place in ("points", "drafts"):
        (swept / "sweep" / place).mkdir(exist_ok=True)
        (swept / "sweep" / place / ".0123456789abcdef.parquet.4711").write_bytes(b"PAR1 and no more")
    sweep(engine="hf", points=2)
    assert contents(swept / "sweep") == whole and not list((swept / "sweep/drafts").iterdir())


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_ends_it_at_once_and_leaves_nothing_running(tiny, number):
    psutil = pytest.importorskip("psutil")
    source = (tiny / "rewards.py").read_text()
    (tiny / "rewards.py").write_text(
        "import time\n\n\n" + source.replace("    return [len(", "    time.sleep(1)\n    return [len(")
    )
    project = tiny / "rewarded-lines.yaml"
    project.write_text(project.read_text().replace("rewards.py:words", "rewards.py:words\n    workers: 2"))
    process = FORK.Process(target=command.run, args=(tiny / "log", *SWEEP))
    process.start()
    deadline = time.monotonic() + 180
    while not list((tiny / "run/points").glob("*.parquet")):
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.1)
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 2
    os.kill(process.pid, number)
    process.join(30)
    assert process.exitcode and "Traceback" not in (tiny / "log").read_text()
    gone, alive = psutil.wait_procs(children, timeout=10)
    assert not alive and len(gone) == len(children)
    assert not list((tiny / "run/points").glob(".*"))


def test_two_sweeps_on_one_folder(tiny):
    logs = [tiny / "first-log", tiny / "second-log"]
    processes = [FORK.Process(target=command.run, args=(log, *SWEEP)) for log in logs]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    said = "".join(log.read_text() for log in logs)
    assert sorted(process.exitcode for process in processes) == [0, 1]
    assert "another process is at work in this folder" in said
    assert load_run(tiny / "run").header["complete"]


def test_a_full_disk_is_one_message_and_what_was_done_stays(tiny, monkeypatch):
    real, room = pq.write_table, iter(range(4))

    def full(table, path):
        real(table, path)
        if next(room, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(records.pq, "write_table", full)
    with pytest.raises(OSError, match="No space left"):
        sweep(engine="hf", points=3)
    monkeypatch.setattr(records.pq, "write_table", real)
    assert not [path for path in (tiny / "sweep").rglob(".*") if path.name != ".lock"]
    assert sweep(engine="hf", points=3).header["complete"]


def run_limited(log, *args):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))
    command.run(log, *args)


def test_a_limit_on_the_size_of_files_is_one_message(tiny):
    args = ("sweep", "--engine", "hf", "--points", "2", "--out", "run")
    process = FORK.Process(target=run_limited, args=(tiny / "log", *args))
    process.start()
    process.join(120)
    said = (tiny / "log").read_text()
    assert process.exitcode == 1 and "Traceback" not in said and said.strip()
    assert sweep(engine="hf", points=2, out="run").header["complete"]


def test_a_sweep_that_was_never_begun_leaves_no_folder(tiny):
    project = tiny / "rewarded-lines.yaml"
    project.write_text(project.read_text().replace("second: second", "second: absent"))
    with pytest.raises(UserError):
        sweep(engine="hf", out="run")
    assert not (tiny / "run").exists()

"""The trace of a run: Chrome's format, readable after a kill, replaced only by another trace."""

import json
import threading
from collections import Counter

import pytest
from progress_told import Told

from rewarded_lines import score, search, sweep
from rewarded_lines.errors import UserError
from rewarded_lines.trace import recording, span


def events(path):
    """Return the finished work in a trace, as viewers read it: the closing bracket may be missing."""
    lines = json.loads(path.read_text().rstrip().rstrip(",") + "]")
    assert lines[0]["ph"] == "M" and {line["ph"] for line in lines[1:]} <= {"X"}
    return lines[1:]


def test_a_sweep_a_search_and_a_score_tell_what_they_do_when(tiny):
    told = Told()
    run = sweep(engine="hf", trace="sweep.json", progress=told)
    found = events(tiny / "sweep.json")
    names = Counter(one["name"] for one in found)
    assert names["write point"] == len(run.points) == 7 and names["swap weights"] >= 6
    assert names["score words"] >= 1 and names["engine"] == 1 and names["closing the run"] == 1
    assert all(any(step == one["name"] for one in found) for step in told.steps)
    # The account of the run is that of the trace: whole seconds in microseconds.
    swaps = sum(one["dur"] for one in found if one["name"] == "swap weights") / 1e6
    assert swaps == pytest.approx(run.header["seconds_last"]["swap"], rel=0.05, abs=0.01)
    engine = next(one for one in found if one["name"] == "engine")
    step = next(one for one in found if one["name"] == "building the engine")
    assert step["ts"] <= engine["ts"] and engine["ts"] + engine["dur"] <= step["ts"] + step["dur"] + 1
    score("first", engine="hf", trace="score.json")
    search("sweep", points=1, trace="search.json")
    assert events(tiny / "score.json") and events(tiny / "search.json")


def test_spans_nest_and_threads_have_rows_of_their_own(tmp_path):
    def work():
        with span("inner", item=3):
            pass

    with recording(tmp_path / "t.json") as progress, span("outer"):
        progress.start("step")
        other = threading.Thread(target=work)
        other.start()
        other.join()
        work()
    with span("after"):
        pass
    found = events(tmp_path / "t.json")
    assert Counter(one["name"] for one in found) == {"inner": 2, "outer": 1, "step": 1}
    rows = [one["tid"] for one in found if one["name"] == "inner"]
    assert len(set(rows)) == 2 and found[0]["args"] == {"item": 3}


def test_a_trace_ends_with_what_was_finished(tmp_path):
    with pytest.raises(RuntimeError), recording(tmp_path / "t.json"):
        with span("done"):
            pass
        # A kill leaves the file as it is here.
        assert [one["name"] for one in events(tmp_path / "t.json")] == ["done"]
        raise RuntimeError
    with recording(tmp_path / "t.json"):
        pass
    assert events(tmp_path / "t.json") == []


def test_no_other_file_is_replaced(tiny, cli):
    (tiny / "mine.json").write_text("[1, 2]")
    done = cli("sweep", "--engine", "hf", "--trace", "mine.json")
    assert done.code == 1 and "the file exists and is no trace" in done.err and "--trace" in done.err
    assert (tiny / "mine.json").read_text() == "[1, 2]" and not (tiny / "sweep").exists()
    with pytest.raises(UserError, match="cannot be written"), recording("nowhere/t.json"):
        pass

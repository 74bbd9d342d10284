"""The progress that the command line shows: a bar on a terminal, lines in a log, nothing for short work."""

import io
import json
import os
import pty
import re
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from command import COMMAND, ENVIRONMENT
from rich.console import Console

from rewarded_lines.cli import display, main, rounds_command
from rewarded_lines.cli.display import Work, progress_bar, show_json

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Clock:
    """A clock that a test sets."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(display, "monotonic", clock)
    return clock


def shown(work, width=80):
    console = Console(width=width, force_terminal=True, color_system=None)
    with console.capture() as capture:
        console.print(work)
    return [" ".join(line.split()) for line in ESCAPES.sub("", capture.get()).splitlines()]


def test_what_is_prepared_has_a_name_and_a_time(clock):
    work = Work("Sweep", "point")
    work.start("building the engine")
    clock.now = 7
    (line,) = shown(work)
    assert line.endswith("Sweep: building the engine 0:00:07")


def test_rate_and_time_left_are_those_of_the_points_alone(clock):
    work = Work("Sweep", "point")
    work.expect(12)
    work.start("reading what is there")
    work.advance(4, "points already there")
    work.start("building the engine")
    assert work.rate() is None and work.left() is None
    clock.now = 100
    work.start("generating lines λ=0.5", counted=True)
    clock.now = 108
    for name in "ab":
        work.advance(1, name)
    clock.now = 110
    # A started point does not change the rate.
    work.start("scoring", counted=True)
    work.start("generating lines λ=0.6", counted=True)
    clock.now = 112
    assert work.rate() == pytest.approx(2 / 8) and work.left() == pytest.approx(6 / (2 / 8) - 4)
    bar, stage = shown(work)
    assert bar.startswith("Sweep ━") and "6/12 points 4.0 s each 0:00:20 left" in bar
    assert stage.endswith("generating lines λ=0.6 0:00:02")


def test_a_second_preparation_does_not_slow_the_rate(clock):
    work = Work("Sweep", "point")
    work.expect(4)
    work.start("generating", counted=True)
    clock.now = 1
    work.advance(2, "a")
    work.start("reading what is there")
    clock.now = 50
    work.start("generating", counted=True)
    clock.now = 51
    work.advance(1, "b")
    assert work.rate() == pytest.approx(3 / 2) and "1.5/s" in shown(work)[0]


def test_bytes_are_shown_as_sizes(clock):
    work = Work("Merging", "byte")
    work.expect(4_000_000_000)
    work.start("merging blocks", counted=True)
    clock.now = 2
    work.advance(1_000_000_000, "model.norm.weight")
    assert "1.0 GB/4.0 GB 500.0 MB/s 0:00:06 left" in shown(work)[0]


def test_a_name_in_brackets_is_no_markup():
    """rich would drop "[words]", and end the command at "[/x]"."""
    scores = {"length[words]": {"value": 1.0, "low": 0.5, "high": 1.5}}
    one = SimpleNamespace(number=1, scores=scores, seconds=2.0, merged="rounds/[/x]")
    text = " ".join(shown(rounds_command._table([one])))
    assert "length[words]" in text and "rounds/[/x]" in text


@pytest.mark.parametrize("width", [40, 80, 200])
def test_it_fits_the_terminal(clock, width):
    work = Work("Merging", "byte")
    work.expect(10**9)
    work.start("a stage with quite a long name " * 5, counted=True)
    clock.now = 2
    work.advance(10**8, "x")
    console = Console(width=width, force_terminal=True, color_system=None)
    with console.capture() as capture:
        console.print(work)
    assert max(map(len, ESCAPES.sub("", capture.get()).splitlines())) <= width


@pytest.fixture
def terminal(monkeypatch):
    """Treat stderr as a terminal, and show the bar at once, not after two seconds."""
    console = Console(stderr=True, force_terminal=True, width=80)
    monkeypatch.setattr(display, "Console", lambda stderr: console)
    monkeypatch.setattr(display, "PATIENCE", 0.0)


def test_long_work_is_shown_and_wiped_away_at_the_end(terminal, capsys):
    with progress_bar("Sweep", unit="point") as work:
        work.expect(4)
        work.start("generating", counted=True)
        work.advance(3, "a")
        time.sleep(0.5)
    captured = capsys.readouterr()
    assert "Sweep" in captured.err and "3/4 points" in captured.err and captured.out == ""
    # The last output erases the lines.
    assert captured.err.rstrip().endswith("\x1b[2K")


def test_short_work_shows_nothing(terminal, capsys, monkeypatch):
    monkeypatch.setattr(display, "PATIENCE", 60.0)
    with progress_bar("Reading") as work:
        work.advance(3, "x")
    assert capsys.readouterr().err == ""


def test_quiet_shows_nothing(terminal, capsys):
    with progress_bar("Sweep", quiet=True) as work:
        work.advance(1, "a")
        time.sleep(0.1)
    assert capsys.readouterr().err == ""


def test_a_stderr_that_is_no_terminal_gets_no_bar(capsys, monkeypatch):
    monkeypatch.setattr(display, "PATIENCE", 0.0)
    # The work ends before the first line.
    with progress_bar("Sweep") as work:
        work.advance(1, "a")
        time.sleep(0.1)
    assert capsys.readouterr().err == ""


def test_a_log_gets_a_line_from_time_to_time(capsys, monkeypatch):
    monkeypatch.setattr(display, "SECONDS_BETWEEN_LINES", 0.05)
    monkeypatch.setenv("COLUMNS", "40")
    name = "[generating] a point :x: whose name is longer than the line would be"
    told = ""

    def wait_for(text):
        nonlocal told
        end = time.monotonic() + 60
        while text not in told:
            assert time.monotonic() < end, told
            time.sleep(0.01)
            told += capsys.readouterr().err

    with progress_bar("Sweep", unit="point") as work:
        work.expect(4)
        work.start(name, counted=True)
        wait_for(f"Sweep: 0/4 points; {name} 0:0")
        work.advance(1, "a")
        wait_for("Sweep: 1/4 points, ")
        wait_for("left; ")
    assert "\x1b" not in told


def test_a_log_gets_no_line_of_what_is_quiet_or_soon_over(capsys, monkeypatch):
    with progress_bar("Sweep"):
        time.sleep(0.1)
    monkeypatch.setattr(display, "SECONDS_BETWEEN_LINES", 0.01)
    with progress_bar("Sweep", quiet=True):
        time.sleep(0.1)
    assert capsys.readouterr().err == ""


def test_what_is_only_prepared_has_no_count_in_a_line(clock):
    work = Work("Sweep", "point")
    work.start("building the engine")
    clock.now = 7
    assert work.line() == "Sweep: building the engine 0:00:07"
    work.expect(12)
    work.advance(4, "points already there")
    work.start("generating", counted=True)
    clock.now = 17
    work.advance(2, "a")
    clock.now = 18
    assert work.line() == "Sweep: 6/12 points, 5.0 s each, 0:00:29 left; generating 0:00:11"


def test_what_is_printed_meanwhile_is_no_result(capfd):
    script = "import os; os.write(1, b'from elsewhere\\n')"
    with progress_bar("Sweep"):
        print("a library")  # noqa: T201
        os.write(1, b"not Python\n")
        subprocess.run([sys.executable, "-c", script], check=True)
    print("the result")  # noqa: T201
    captured = capfd.readouterr()
    assert captured.out == "the result\n"
    assert all(text in captured.err for text in ("a library", "not Python", "from elsewhere"))


def test_an_interrupt_gives_the_terminal_back(terminal, capsys):
    with pytest.raises(KeyboardInterrupt), progress_bar("Sweep") as work:
        work.start("generating", counted=True)
        time.sleep(0.3)
        raise KeyboardInterrupt
    # The cursor is visible again.
    assert capsys.readouterr().err.count("\x1b[?25h") == 1


NOISY = """\
import os, time
print("hello from the reward's file")
os.write(1, b"and from below Python\\n")

def words(prompts, responses):
    print("scoring")
    return [float(len(response)) for response in responses]

letters = words
"""


def on_a_terminal(folder, *args):
    """Run a command with its stderr on a terminal; return the exit code, stdout and the terminal's text."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [*COMMAND, *args], env=ENVIRONMENT | {"COLUMNS": "80"}, cwd=folder, stdout=subprocess.PIPE, stderr=theirs
    ) as child:
        os.close(theirs)
        told = b""
        while True:
            try:
                piece = os.read(ours, 4096)
            except OSError:
                break
            if not piece:
                break
            told += piece
        out = child.stdout.read()
    os.close(ours)
    return child.returncode, out.decode(), told.decode()


def test_stages_are_named_on_a_terminal_unless_it_is_to_be_quiet(tiny):
    (tiny / "score.py").write_text(
        NOISY + "def best(folder):\n    time.sleep(0.9)\n    words('', '')\n    return 1.0\n"
    )
    args = ("merge", "--method", "greedy", "--score", "score.py:best", "--overwrite", "--out", "out")
    code, out, told = on_a_terminal(tiny, *args)
    assert code == 0 and out.startswith("merged\n") and "scoring" not in out
    # The third candidate starts after two seconds.
    assert "Merging: trying first + second" in told and "and from below Python" in told
    code, out, told = on_a_terminal(tiny, *args, "--quiet")
    assert code == 0 and out.startswith("merged\n") and "Merging" not in told


def test_json_is_one_document_whatever_libraries_print(tiny, capfd, monkeypatch):
    (tiny / "rewards.py").write_text(NOISY)
    monkeypatch.setattr("sys.argv", ["rewarded-lines", "sweep", "--engine", "hf", "--points", "2", "--json"])
    main()
    captured = capfd.readouterr()
    assert len(json.loads(captured.out)["points"]) == 5
    assert "and from below Python" in captured.err and "scoring" in captured.err


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_json_is_json_in_every_encoding(monkeypatch, encoding):
    buffer = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(buffer, encoding, errors="backslashreplace"))
    show_json({"λ": "é"})
    sys.stdout.flush()
    assert json.loads(buffer.getvalue().decode(encoding)) == {"λ": "é"}


@pytest.mark.slow
def test_json_is_one_document_whatever_vllm_prints(tiny):
    (tiny / "rewards.py").write_text(NOISY)
    args = ("sweep", "--engine", "vllm", "--points", "2", "--json")
    # A user may turn on vLLM's own messages.
    loud = ENVIRONMENT | {"VLLM_LOGGING_LEVEL": "INFO"}
    done = subprocess.run([*COMMAND, *args], env=loud, cwd=tiny, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["points"]) == 5

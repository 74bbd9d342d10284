"""The progress bar: only on a terminal, only when asked for, and not for work that is over at once."""

import pytest
from rich.console import Console

from rewarded_lines.cli import progress
from rewarded_lines.cli.progress import progress_bar


@pytest.fixture
def shown(monkeypatch):
    """Take stderr for a terminal, and return what a bar has written to it."""
    console = Console(stderr=True, force_terminal=True, width=80)
    monkeypatch.setattr(progress, "Console", lambda stderr: console)
    return lambda capsys: capsys.readouterr().err


def test_a_bar_shows_title_and_count(shown, capsys):
    with progress_bar("Sweep") as advance:
        advance(3, 4)
    text = shown(capsys)
    assert "Sweep" in text and "3/4" in text


def test_short_work_shows_none(shown, capsys):
    with progress_bar("Reading", after=60) as advance:
        advance(3, 4)
    assert shown(capsys) == ""


def test_long_work_shows_all_that_is_done(shown, capsys, monkeypatch):
    times = iter([0.0, 1.0, 3.0])
    monkeypatch.setattr(progress, "monotonic", lambda: next(times))
    with progress_bar("Reading", after=2) as advance:
        advance(1, 4)
        advance(2, 4)
    assert "3/4" in shown(capsys)


@pytest.mark.parametrize("terminal", [True, False])
def test_quiet_or_unseen_shows_none(capsys, monkeypatch, terminal):
    console = Console(stderr=True, force_terminal=terminal)
    monkeypatch.setattr(progress, "Console", lambda stderr: console)
    with progress_bar("Sweep", quiet=terminal) as advance:
        advance(1, 1)
    assert capsys.readouterr().err == ""

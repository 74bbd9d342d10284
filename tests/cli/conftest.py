"""Fixtures of the command line's tests."""

import pytest
import typer


@pytest.fixture
def quick(cli, monkeypatch):
    """The command line, with its parser built once: that is half the time of a small merge."""
    from rewarded_lines import cli as module

    monkeypatch.setattr(module, "app", typer.main.get_command(module.app))
    # No power fails here, and flushing is most of the remaining time.
    monkeypatch.setattr("rewarded_lines.folders._sync", lambda path: None)
    return cli


@pytest.fixture
def narrow(cli, monkeypatch):
    """Run a command on a terminal of 80 columns."""

    def run(*args):
        setenv = monkeypatch.setenv
        monkeypatch.setattr(monkeypatch, "setenv", lambda name, value: setenv(name, "80"))
        return cli(*args)

    return run

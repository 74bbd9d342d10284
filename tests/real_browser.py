"""Chromium for the tests of pages, and where their screenshots go."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "google-chrome", "google-chrome-stable", "chromium-browser")
ARGUMENTS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)
# The machine may be busy with other tests.
PATIENCE = 60_000


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium; without one tests are skipped, unless REWARDED_LINES_BROWSER says that there must be one."""
    wanted = os.environ.get("REWARDED_LINES_BROWSER")
    found = next(filter(None, map(shutil.which, [wanted] if wanted else NAMES)), None)
    if found is None:
        if wanted:
            pytest.fail(f"REWARDED_LINES_BROWSER names no program: {wanted}")
        pytest.skip("no Chromium: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    # Not for the whole session: while it runs, nothing else in this process may have an event loop.
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=found, args=list(ARGUMENTS))
        yield running
        running.close()


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where screenshots are kept: the folder that REWARDED_LINES_PICTURES names, or pytest's own of this run."""
    return Path(os.environ.get("REWARDED_LINES_PICTURES") or tmp_path_factory.getbasetemp() / "pictures")

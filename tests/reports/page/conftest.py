"""A real browser that opens pages from disk, and runs whose responses are worth reading."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from invented_runs import synthetic_run
from real_browser import PATIENCE

from rewarded_lines.evaluator.records import Point, Run, load_run
from rewarded_lines.reports.page.page import page
from rewarded_lines.reports.summary import summarise

WORDS = (
    "a film of quiet wit and sharp turns that never quite finds its heart but keeps you watching until the end".split()
)


@dataclass
class Opened:
    """A page in the browser, where its pictures go, what went wrong on it, and what it asked for."""

    page: Any
    pictures: Path
    problems: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def settled(self) -> Any:
        """Return the page once it shows the responses that it was asked for."""
        self.page.wait_for_selector("#list[aria-busy=false]", state="attached")
        return self.page

    def drawn(self) -> Any:
        """Return the page once its front is drawn."""
        self.page.wait_for_selector("#plot[aria-busy=false]")
        return self.page

    def check(self) -> None:
        """Assert that the page met no error and asked for nothing but itself."""
        assert self.problems == []
        assert len(self.requests) == 1 and self.requests[0].startswith("file:")

    def picture(self, name: str) -> None:
        """Keep a screenshot, for people to look at."""
        self.pictures.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=self.pictures / f"{name}.png")


@dataclass(frozen=True)
class Written:
    """A page on disk, and the runs that it shows."""

    path: Path
    runs: list[Run]


def open_page(
    browser: Any, pictures: Path, written: Written, width: int = 1280, height: int = 1000, **options: Any
) -> Opened:
    """Open a file as a user would."""
    context = browser.new_context(viewport={"width": width, "height": height}, **options)
    context.set_default_timeout(PATIENCE)
    opened = Opened(context.new_page(), pictures)
    opened.page.on("console", lambda message: opened.problems.append(message.text))
    opened.page.on("pageerror", lambda error: opened.problems.append(str(error)))
    opened.page.on("request", lambda request: opened.requests.append(request.url))
    opened.page.goto(written.path.as_uri())
    opened.settled()
    return opened


@pytest.fixture
def opening(browser: Any, pictures: Path) -> Iterator[Callable[..., Opened]]:
    """Open pages; in the end none may have met an error or asked for anything but itself."""
    pages: list[Opened] = []

    def open_(written: Written, **options: Any) -> Opened:
        pages.append(open_page(browser, pictures, written, **options))
        return pages[-1]

    yield open_
    for opened in pages:
        opened.page.context.close()
        opened.check()


@pytest.fixture(scope="module")
def kept(browser: Any, pictures: Path, written: Written) -> Iterator[Opened]:
    """One page for all tests of a module, since plotly takes its time; see `shown`."""
    opened = open_page(browser, pictures, written, permissions=["clipboard-read", "clipboard-write"])
    opened.drawn()
    yield opened
    opened.page.context.close()


@pytest.fixture
def shown(kept: Opened) -> Iterator[Opened]:
    """The kept page as it was at first, reset by its own controls."""
    page = kept.page
    page.mouse.move(0, 0)
    page.get_by_role("button", name="lines λ = 0.50", exact=True).click()
    page.get_by_label("Beside SFT and").select_option("")
    page.get_by_role("searchbox").fill("")
    page.get_by_label("Sort by").select_option("prompt")
    if page.get_by_role("button", name="No minimum").is_enabled():
        page.get_by_role("button", name="No minimum").click()
    for box in page.get_by_role("checkbox").all():
        box.check()
    kept.settled().evaluate("() => { scrollTo(0, 0); document.activeElement.blur(); }")
    yield kept
    kept.check()


def spoken(point: Point, words: int = 12) -> Point:
    """Return a point that answers in words of its own instead of one word again and again."""
    rng = np.random.default_rng(
        [int(100 * weight) for weight in point.spec.weights] + [int(10 * point.spec.merge.beta)]
    )
    said = [" ".join(rng.choice(WORDS, size=words)) for _ in point.prompts]
    return replace(point, responses=[f"{text} ({row})" for row, text in enumerate(said)])


@pytest.fixture(scope="module")
def write(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Written]:
    """Write the page of an invented run, or of several."""

    def made(change: Callable[[Run], Run] | None = None, count: int = 1, words: int = 12, **options: Any) -> Written:
        folder = tmp_path_factory.mktemp("page")
        read = [load_run(synthetic_run(folder / f"run{index}", resamples=100, **options)) for index in range(count)]
        runs = [replace(run, points=[spoken(point, words) for point in run.points]) for run in read]
        # Pages are compared, so nothing of the folder may be on them.
        runs = [replace(run, folder=Path(run.folder.name)) for run in runs]
        runs = [change(run) if change else run for run in runs]
        path = folder / "report.html"
        path.write_bytes(page(runs, summarise(runs)))
        return Written(path, runs)

    return made


@pytest.fixture(scope="module")
def written(write: Callable[..., Written]) -> Written:
    """Two methods of five λ, 50 prompts."""
    return write(points=5, prompts=50)

"""Summaries of invented runs, each computed once for all tests of this folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import combinations
from typing import Any

import pytest
from invented_runs import synthetic_run

from rewarded_lines.evaluator.records import load_run
from rewarded_lines.reports.figures.figure_style import house_style
from rewarded_lines.reports.summary import Summary, summarise


@pytest.fixture(autouse=True)
def paper() -> Iterator[None]:
    """Hold the style in which figures are drawn."""
    pytest.importorskip("matplotlib")
    with house_style():
        yield


@pytest.fixture(scope="session")
def make_summary(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Summary]:
    """Return the summary of a `synthetic_run` with some options."""
    made: dict[str, Summary] = {}

    def make(**options: object) -> Summary:
        key = json.dumps(options, sort_keys=True)
        if key not in made:
            folder = synthetic_run(tmp_path_factory.mktemp("run"), **({"resamples": 50, "prompts": 64} | options))
            made[key] = summarise(load_run(folder))
        return made[key]

    return make


@pytest.fixture(scope="session")
def make_front(make_summary: Callable[..., Summary]) -> Callable[..., Any]:
    """Return the drawn front of a `synthetic_run` with some options, for tests that only look at it."""
    from rewarded_lines.reports.figures.front_figures import front_figure

    drawn: dict[str, Any] = {}

    def make(**options: object) -> Any:
        key = json.dumps(options, sort_keys=True)
        if key not in drawn:
            drawn[key] = front_figure(make_summary(**options))
            drawn[key].canvas.draw()
        return drawn[key]

    return make


@pytest.fixture(scope="session")
def check_layout() -> Callable[[Any], None]:
    """Fail where a part leaves the figure, a legend lies over a panel, or a text over another."""

    def check(figure: Any) -> None:
        figure.canvas.draw()
        width, height = figure.bbox.size
        panels = [axes.get_tightbbox() for axes in figure.axes]
        legends = [legend.get_window_extent() for legend in figure.legends]
        for box in (*panels, *legends):
            assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1
        apart = [*legends, *(axes.get_window_extent() for axes in figure.axes)]
        assert not any(one.overlaps(other) for one, other in combinations(apart, 2))
        assert not any(legend.overlaps(panel) for legend in legends for panel in panels)
        for axes in figure.axes:
            for texts in (axes.texts, [tick for tick in axes.get_xticklabels() if tick.get_text()]):
                boxes = [text.get_window_extent() for text in texts]
                # Ticks beyond the ends of an axis have a text too, which is not drawn.
                frame = axes.bbox.padded(9)
                shown = [box for box in boxes if frame.x0 <= (box.x0 + box.x1) / 2 <= frame.x1]
                assert not any(one.overlaps(other) for one, other in combinations(shown, 2))

    return check

"""The page as a file: what `report` writes, and what stands in it before a browser reads it."""

from __future__ import annotations

import base64
import gzip
import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rewarded_lines.evaluator.records import load_run
from rewarded_lines.reports.page.page import page
from rewarded_lines.reports.summary import summarise

BLOCK = r'<script type="{}" id="{}">(.*?)</script>'


def block(html: str, name: str) -> str:
    """Return what a packed block of a page holds."""
    (packed,) = re.findall(BLOCK.format("text/plain", name), html)
    return gzip.decompress(base64.b64decode(packed)).decode()


def overview(html: str) -> Any:
    (text,) = re.findall(BLOCK.format("application/json", "overview"), html)
    return json.loads(text)


def test_report_writes_the_page_and_names_it(make_run: Callable[..., Path], cli: Callable[..., Any]) -> None:
    run = make_run(points=3, prompts=30, resamples=100)
    answer = cli("report", run)
    assert answer.code == 0, answer.err
    path = run / "report" / "report.html"
    assert str(path) in answer.out
    read = load_run(run)
    assert path.read_bytes() == page([read], summarise(read))


def test_without_plotly_all_else_is_written_and_one_line_says_so(
    make_run: Callable[..., Path], cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(points=3, prompts=30, resamples=100)
    monkeypatch.setitem(sys.modules, "plotly", None)
    answer = cli("report", run, "--json")
    assert answer.code == 0
    assert "No report.html" in answer.err and "rewarded-lines[report]" in answer.err
    assert len(answer.err.strip().splitlines()) == 1
    assert json.loads(answer.out)["title"] == "synthetic"
    written = {path.name for path in (run / "report").iterdir()}
    assert {"summary.json", "table.md", "points.csv", "front.png", "front.svg"} <= written
    assert "report.html" not in written


def test_the_file_holds_every_response_and_score(make_run: Callable[..., Path]) -> None:
    run = load_run(make_run(points=3, prompts=30, resamples=100))
    summary = summarise(run)
    html = page([run], summary).decode()
    shown = overview(html)
    assert [point["label"] for point in shown["points"]][:2] == ["SFT", "soup λ = 0.00"]
    assert json.loads(block(html, "prompts-0"))["texts"] == run.sft.prompts
    for index, point in enumerate(run.points):
        held = json.loads(block(html, f"records-0-{index}"))
        assert held["responses"] == point.responses
        for name, values in zip(run.rewards, held["scores"], strict=True):
            assert values == pytest.approx(point.scores[name].tolist(), rel=1e-8)
        means = [one[0] for one in shown["points"][index]["values"][:2]]
        assert means == [summary.points[index].rewards[name].value for name in run.rewards]


def test_points_are_found_in_a_few_passes(make_run: Callable[..., Path]) -> None:
    """One pass for each point would take as long as the square of their number."""

    class Passes(list[Any]):
        count = 0

        def __iter__(self) -> Any:
            self.count += 1
            return super().__iter__()

        def __reversed__(self) -> Any:
            self.count += 1
            return super().__reversed__()

    run = load_run(make_run(points=9, prompts=4, resamples=100))
    points = Passes(run.points)
    page([replace(run, points=points)], summarise(run))
    assert 1 <= points.count <= 5 < len(points)


def test_nothing_may_be_loaded_and_nothing_ends_a_script_early(make_run: Callable[..., Path]) -> None:
    run = load_run(make_run(points=3, prompts=30, resamples=100))
    run.header["title"] = "</script><!--"
    run = replace(run, points=[replace(point, responses=["</script>"] * 30) for point in run.points])
    html = page([run], summarise(run)).decode()
    assert "default-src 'none'" in html and "connect-src" not in html
    assert not re.search(r"\b(src|href)=.?(?!#)[^#]{0,3}(https?:|//)", html)
    # Each script ends where the template ends it: the overview, the program, a block for the prompts, points, plotly.
    assert html.count("<script") == html.count("</script>") == 2 + 1 + len(run.points) + 1
    assert "<!--" not in html.split("<body>")[1]


def test_every_method_has_its_colour_and_mark_of_the_figures(make_run: Callable[..., Path]) -> None:
    methods = {f"m{place:02d}": (1.0, place / 10) for place in range(11)}
    run = load_run(make_run(points=2, prompts=20, resamples=50, methods=methods))
    shown = overview(page([run], summarise(run)).decode())["methods"]
    looks = [(*method["colours"], method["mark"]) for method in shown]
    assert len(set(looks)) == 10 and looks[10] == looks[0]
    assert looks[0] == ("#E69F00", "#e69f00", "square")
    for _, dark, _ in looks:
        assert contrast(dark, "#16181c") >= 3


def contrast(one: str, other: str) -> float:
    """Return the contrast of two colours as WCAG 2 defines it."""

    def luminance(colour: str) -> float:
        channels = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return sum(share * c for share, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted(map(luminance, (one, other)))
    return (high + 0.05) / (low + 0.05)

"""Output fits 80 columns; only paths and commands, which users copy, are longer."""

import re

import pytest
from rich.console import Console

from rewarded_lines.evaluator.records import load_run
from rewarded_lines.reports.summary import summarise
from rewarded_lines.reports.tables import sheets

MANY = {
    name: (alpha, beta)
    for name, alpha, beta in [
        ("soup", 1.0, 0.0),
        ("lines", 1.0, 1.0),
        ("a-method-with-a-long-name", 0.5, 0.5),
        ("reversed", 2.0, -1.0),
        ("ties-lines", 1.5, 0.0),
    ]
}
FOR_COPYING = re.compile(r"/|^rewarded-lines |^\S+$")


def too_long(text, width=80):
    return [line for line in text.splitlines() if len(line) > width and not FOR_COPYING.search(line)]


OPTIONS = {
    "two rewards": {},
    "many methods": {"methods": MANY, "points": 5},
    "three rewards": {"rewards": 3, "policies": 3, "points": 4},
    "four rewards": {"rewards": 4, "policies": 4, "points": 3},
}


def cut(text):
    """Return the parts of folded numbers: each stands alone on its line."""
    return re.findall(r"^\s*(?:±[\d.]+|\[[-\d.]+,|[-\d.]+\])\s*$|\[[-\d.]+,\s*$", text, re.MULTILINE)


@pytest.mark.parametrize("kind", OPTIONS)
def test_tables_fit_and_cut_no_number(make_run, kind):
    summary = summarise(load_run(make_run(prompts=64, resamples=100, control=1.0, **OPTIONS[kind])))
    for width in (80, 100, 200):
        console = Console(width=width)
        with console.capture() as capture:
            for sheet in sheets(summary):
                console.print(sheet)
        text = capture.get()
        assert too_long(text, width) == [] and cut(text) == []
        # Every table has a row for every point.
        assert all(f"{point.ended:.0%}" in text for point in summary.points)


@pytest.mark.slow
def test_a_report_and_a_choice_fit(narrow, make_run):
    run = make_run(prompts=64, resamples=100, control=1.0, **OPTIONS["many methods"])
    answer = narrow("report", run)
    assert answer.code == 0 and too_long(answer.out) == [] and cut(answer.out) == []
    assert all(f"\n {name}\n" in answer.out for name in MANY)
    answer = narrow("choose", run, "--knee")
    assert answer.code == 0 and too_long(answer.out) == []
    (command,) = [line for line in answer.out.splitlines() if line.startswith("rewarded-lines merge")]
    assert command.endswith("--out chosen")


def test_a_merge_fits_and_its_paths_are_whole(narrow, tiny):
    out = "a-folder/whose-name-is-long/" + "x" * 60
    answer = narrow("merge", "--lam", "0.25", "--lam", "0.5", "--alpha", "auto", "--out", out)
    assert answer.code == 0 and too_long(answer.out) == []
    lines = answer.out.splitlines()
    assert [f"{out}/lam=0.25", f"{out}/lam=0.50"] == lines[-2:]


def test_a_score_and_a_search_fit(narrow, tiny):
    scored = narrow("score", "first", "--engine", "hf")
    assert scored.code == 0 and "Policies against SFT" in scored.out and too_long(scored.out) == []
    args = ("--config", "rewarded-lines.yaml", "--engine", "hf", "--method", "lines", "--points", 4)
    found = narrow("search", "found", *args)
    assert found.code == 0 and "lines: 4 points (1 added)" in found.out and too_long(found.out) == []

"""All figures of a run: which there are, and that names of any length fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("matplotlib")

import rewarded_lines.reports.report as report
from rewarded_lines.reports.figures.figure_style import figure_bytes
from rewarded_lines.reports.figures.training_curves import Training
from rewarded_lines.reports.report import FIGURES, figures
from rewarded_lines.reports.summary import Summary

MakeSummary = Callable[..., Summary]
LOG = Training("cheerful", 0, [{"step": 1, "reward": 0.1, "kl": 0.0}, {"step": 2, "reward": 0.5, "kl": 0.1}], True)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw nothing, where only the list of figures is asked for."""
    for name in FIGURES[:-1]:
        monkeypatch.setattr(report, f"{name}_figure", lambda *_: object())


def renamed(summary: Summary, reward: str, policy: str) -> Summary:
    """Return a summary whose rewards and policies have longer names."""

    def longer(values: dict[str, Any]) -> dict[str, Any]:
        return {name + reward: value for name, value in values.items()}

    return replace(
        summary,
        rewards=longer(summary.rewards),
        policies=[name + policy for name in summary.policies],
        points=[replace(point, rewards=longer(point.rewards)) for point in summary.points],
        references={name: longer(at) for name, at in summary.references.items()},
    )


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"rewards": 1}, ["front"]),
        ({"rewards": 2}, ["front", "kl"]),
        ({"rewards": 3, "policies": 3, "control": 1.0}, ["front", "kl", "forgetting", "simplex"]),
        ({"rewards": 4, "policies": 4}, ["front", "kl", "parallel"]),
    ],
)
def test_a_run_has_the_figures_that_it_has_data_for(
    make_summary: MakeSummary, undrawn: None, options: dict[str, Any], expected: list[str]
) -> None:
    made = [name for name, _ in figures(make_summary(points=3, **options), [])]
    assert made == expected and set(made) <= set(FIGURES)


def test_audits_make_no_front(make_summary: MakeSummary, undrawn: None) -> None:
    audited = replace(make_summary(rewards=4, policies=4, points=3), audits=["polite"])
    assert "parallel" not in dict(figures(audited))


def test_logs_of_training_are_drawn(make_summary: MakeSummary) -> None:
    assert [name for name, _ in figures(make_summary(points=3, rewards=1), [LOG])] == ["front", "training"]


@pytest.mark.parametrize(
    ("size", "points"), [(2, 3), *(pytest.param(*more, marks=pytest.mark.slow) for more in ((4, 3), (8, 12)))]
)
def test_long_names_fit(make_summary: MakeSummary, check_layout: Callable[[Any], None], size: int, points: int) -> None:
    summary = make_summary(points=points, rewards=size, policies=size, control=1.0)
    long = renamed(summary, " as judged by a rather verbose model", "-from-some-8b-instruct-ppo-seed-0")
    for _, figure in figures(long, [replace(LOG, policy=long.policies[0])]):
        check_layout(figure)


def test_a_dollar_is_no_formula(make_summary: MakeSummary) -> None:
    """matplotlib would draw "cost [$] × [$]" without its dollars, and refuse "$_$"."""
    summary = renamed(make_summary(points=3, rewards=2), " $_$", " <$_$>")
    _, front = next(figures(replace(summary, rewards=dict.fromkeys(summary.rewards, "$"))))
    text = figure_bytes(front, "svg").decode()
    assert "positive $_$ [$]" in text and "[$ × $]" in text and "cheerful &lt;$_$&gt;" in text


@pytest.mark.slow
def test_every_figure_has_the_same_bytes_each_time(make_summary: MakeSummary) -> None:
    summary = make_summary(points=3, rewards=2, policies=3, control=1.0)
    first, second = ({name: figure_bytes(figure, "svg") for name, figure in figures(summary, [LOG])} for _ in range(2))
    assert first == second and len(first) == 5
    # Texts are texts, not outlines.
    assert all(b"<text" in drawn and b"DejaVuSans-" not in drawn for drawn in first.values())

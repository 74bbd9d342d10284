"""What methods are called in figures, and which points stand for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from rewarded_lines.evaluator.records import load_run
from rewarded_lines.reports.summary import PointSummary, Summary, summarise
from rewarded_lines.reports.texts import method_label, method_labels


@pytest.fixture
def summary(make_run: Callable[..., Path]) -> Summary:
    return summarise(load_run(make_run(points=11, prompts=4, resamples=20)))


def _changed(point: PointSummary, **given: object) -> PointSummary:
    """Return a point with other numbers, "rule" the method of its merge."""
    numbers = {name: given.pop(name) for name in ("alpha", "beta", "rule") if name in given}
    if "rule" in numbers:
        numbers["method"] = numbers.pop("rule")
    return replace(point, merge=replace(point.merge, **numbers), **given)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"alpha": 1.0, "beta": 0.0}, "Rewarded Soups (β = 0)"),
        ({"alpha": 0.5, "beta": 0.0}, "Rewarded Soups (α = 0.5, β = 0)"),
        ({"alpha": 1.0, "beta": 1.0}, "LiNeS (α = β = 1)"),
        ({"alpha": 1.0, "beta": 0.5}, "LiNeS (α = 1, β = 0.5)"),
        ({"alpha": 2.0, "beta": -1.0}, "LiNeS (α = 2, β = −1)"),
        ({"rule": "ties", "beta": 0.0}, "TIES (β = 0)"),
        ({"rule": "dare-ties", "alpha": 1.0, "beta": 1.0}, "DARE-TIES + LiNeS (α = β = 1)"),
        ({"method": "tuned", "alpha": 1.7, "beta": 1.8}, "LiNeS, tuned (α = 1.7, β = 1.8)"),
        ({"method": "baselines", "checkpoint": "morl"}, "baselines"),
    ],
)
def test_method_labels(summary: Summary, given: dict[str, object], expected: str) -> None:
    points = [_changed(point, **given) for point in summary.methods()["soup"]]
    assert method_label(points) == expected


def test_an_alpha_that_differs_between_points_is_a_range(summary: Summary) -> None:
    points = summary.methods()["soup"]
    varied = [_changed(point, method="uniform", alpha=1.3 + 0.01 * index) for index, point in enumerate(points)]
    assert method_label(varied) == "uniform (α = 1.30 to 1.40, β = 0)"


def test_a_range_that_is_shown_as_one_number_is_one(summary: Summary) -> None:
    points = summary.methods()["soup"]
    varied = [_changed(point, method="uniform", alpha=1.53 + 1e-4 * index) for index, point in enumerate(points)]
    assert method_label(varied) == "uniform (α = 1.53, β = 0)"


def test_methods_of_one_label_have_their_names_before_it(summary: Summary) -> None:
    again = [replace(point, method="seed 2") for point in summary.methods()["soup"]]
    labels = method_labels(replace(summary, points=[*summary.points, *again]))
    assert labels == {
        "soup": "soup: Rewarded Soups (β = 0)",
        "lines": "LiNeS (α = β = 1)",
        "seed 2": "seed 2: Rewarded Soups (β = 0)",
    }


def test_single_policies_are_no_method(summary: Summary) -> None:
    alone = replace(summary.methods()["soup"][0], method="policies")
    assert list(replace(summary, points=[*summary.points, alone]).merged_methods()) == ["soup", "lines"]
    assert [name for _, name in summary.policy_points()] == ["cheerful", "detailed"]

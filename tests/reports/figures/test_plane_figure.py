"""One plane: the shaded area, which methods are chosen, what axes are called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from rewarded_lines.pareto.hypervolume import hypervolume
from rewarded_lines.reports.figures.plane_figure import KL, PERPLEXITY, axis_label, prepare, spread, staircase
from rewarded_lines.reports.summary import Summary

MakeSummary = Callable[..., Summary]
_LONG = "control perplexity [per token]\nlower is better"
MANY = {f"m{index}": (1.0, index / 8) for index in range(9)}


def test_the_shaded_area_is_the_hypervolume() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        points, reference = rng.normal(size=(8, 2)), rng.normal(size=2) - 0.5
        x, y = staircase(points, reference).T
        area = abs(x @ np.roll(y, 1) - y @ np.roll(x, 1)) / 2
        assert area == pytest.approx(hypervolume(points, reference))


def test_nothing_is_shaded_where_nothing_beats_the_reference() -> None:
    corners = staircase(np.array([[1.0, -1.0], [-1.0, 1.0]]), np.zeros(2))
    assert (corners == 0).all()


def test_of_many_methods_the_first_and_the_best_are_chosen(make_summary: MakeSummary) -> None:
    few, many = prepare(make_summary(points=5)), prepare(make_summary(points=5, methods=MANY))
    assert few.chosen == ("soup", "lines")
    volumes = {row.method: row.hypervolume.value for row in many.summary.hypervolumes if row.reference == "sft"}
    assert many.chosen == ("m0", max(volumes, key=volumes.__getitem__))
    assert len({(look.colour, look.marker) for look in many.looks.values()}) == 9


@pytest.mark.parametrize(
    ("name", "one", "two"),
    [
        ("positive", "positive [logit], higher is better →", "positive [logit]\nhigher is better →"),
        ("polite", "polite (audit), higher is better →", "polite (audit)\nhigher is better →"),
        (KL, "KL to SFT [nats], lower is closer", "KL to SFT [nats]\nlower is closer"),
        (f"control{PERPLEXITY}", _LONG, _LONG),
    ],
)
def test_axes_say_name_unit_and_direction(make_summary: MakeSummary, name: str, one: str, two: str) -> None:
    summary = replace(make_summary(rewards=3, points=5), audits=["polite"])
    assert axis_label(name, summary) == one and axis_label(name, summary, lines=2) == two


def test_spread_keeps_the_ends(make_summary: MakeSummary) -> None:
    points = make_summary(points=11).methods()["soup"]
    assert [point.lam for point in spread(points)] == [0.0, 0.2, 0.5, 0.8, 1.0]
    assert [point.lam for point in spread(points, 1)] == [0.5]
    assert spread(points[:2]) == points[:2]
    assert spread(points[:1]) == points[:1]

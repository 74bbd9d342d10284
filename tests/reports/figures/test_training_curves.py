"""Training curves: which measures are drawn for which recipe, and what is left out."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

pytest.importorskip("matplotlib")

from rewarded_lines.reports.figures.training_curves import Training, training_figure

PPO = {"objective/scores": [math.nan, 0.1, 0.5], "objective/kl": [math.nan, 0.0, 2.0]}
RLOO = {"reward": [math.nan, 0.1, 0.5], "kl": [math.nan, 0.0, 0.1]}
DPO = {"rewards/margins": [math.nan, 0.1, 0.5], "rewards/accuracies": [math.nan, 0.5, 0.9]}


def training(values: dict[str, list[float]], policy: str = "positive", run: int = 0, standardized=True) -> Training:
    lines = [{"step": step, **{name: column[step] for name, column in values.items()}} for step in range(3)]
    return Training(policy, run, lines, standardized)


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        (
            PPO,
            ["reward in training\n[SD on SFT], higher is better →", "KL to SFT\n[nats per response], lower is closer"],
        ),
        (RLOO, ["reward in training\n[SD on SFT], higher is better →", "KL to SFT\n[nats per token], lower is closer"]),
        (
            DPO,
            [
                "margin of chosen over rejected\n[nats × β], higher is better →",
                "pairs in the right order [share]\nhigher is better →",
            ],
        ),
    ],
)
def test_each_recipe_has_its_measures(
    values: dict[str, list[float]], labels: list[str], check_layout: Callable
) -> None:
    figure = training_figure([training(values), training(values, "detailed")])
    assert [axes.get_ylabel() for axes in figure.axes] == labels
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["positive", "detailed"]
    for axes, name in zip(figure.axes, values, strict=True):
        assert [list(line.get_ydata()) for line in axes.lines] == [values[name][1:]] * 2
        assert list(axes.lines[0].get_xdata()) == [1, 2]
    check_layout(figure)


def test_recipes_that_differ_share_the_panels_they_have_in_common(check_layout: Callable) -> None:
    figure = training_figure([training(PPO), training(RLOO, "detailed", standardized=False)])
    assert len(figure.axes) == 3 and len(figure.axes[0].lines) == 2
    assert "[SD on SFT or own unit]" in figure.axes[0].get_ylabel()
    check_layout(figure)


def test_further_seeds_are_thin_and_in_the_same_colour() -> None:
    figure = training_figure([training(PPO), training(PPO, run=1)])
    first, second = figure.axes[0].lines
    assert first.get_color() == second.get_color() and second.get_linewidth() < first.get_linewidth()
    assert "other training seeds" in [text.get_text() for text in figure.legends[0].get_texts()]


def test_nothing_logged_is_nothing_drawn() -> None:
    assert training_figure([]) is None
    assert training_figure([training({"loss": [1.0, 2.0, 3.0]})]) is None
    assert training_figure([training({"reward": [math.nan] * 3})]) is None

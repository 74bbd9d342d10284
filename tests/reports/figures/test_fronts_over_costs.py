"""Reward over KL and over the perplexity of control texts: what is drawn where, and at which numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from rewarded_lines.pareto.bootstrap import Estimate
from rewarded_lines.reports.figures.front_figures import forgetting_figure, kl_figure
from rewarded_lines.reports.summary import Summary

MakeSummary = Callable[..., Summary]


def line(axes, label: str) -> np.ndarray:
    return next(line.get_xydata() for line in axes.lines if line.get_label() == label)


def test_a_panel_for_every_reward_with_audits(make_summary: MakeSummary) -> None:
    summary = replace(make_summary(rewards=3, points=5), audits=["polite"])
    figure = kl_figure(summary)
    assert [axes.get_ylabel().split("\n")[0] for axes in figure.axes] == [
        "positive [logit]",
        "detailed [words]",
        "polite (audit)",
    ]
    assert {axes.get_xlabel() for axes in figure.axes} == {"KL to SFT [nats]\nlower is closer\nsquare-root scale"}
    points = summary.methods()["lines"]
    for axes, reward in zip(figure.axes, summary.rewards, strict=True):
        expected = [[point.kl.value, point.rewards[reward].value] for point in points]
        np.testing.assert_array_equal(line(axes, "LiNeS (α = β = 1)"), expected)


def test_the_root_of_kl_is_drawn_also_below_zero(make_summary: MakeSummary) -> None:
    axes = kl_figure(make_summary(points=5)).axes[0]
    at = axes.transData.transform([(value, 0.0) for value in (-1.0, 0.0, 1.0, 4.0)])[:, 0]
    steps = np.diff(at)
    assert steps == pytest.approx([steps[0]] * 3)
    assert 0.0 in axes.get_xticks()


def test_perplexities_that_lie_close_are_drawn_as_they_are(make_summary: MakeSummary) -> None:
    figure = forgetting_figure(make_summary(points=5, control=1.0))
    assert figure.axes[0].get_xscale() == "linear"
    assert figure.axes[0].get_xlabel() == "control perplexity [per token]\nlower is better"


def test_perplexities_far_apart_are_drawn_on_a_log_scale(make_summary: MakeSummary) -> None:
    summary = make_summary(points=5, control=1.0)
    far = [replace(point, perplexities={"control": Estimate(20.0 * 4**i, 20.0 * 4**i, 21.0 * 4**i)}) for i, point in
           enumerate(summary.points)]  # fmt: skip
    axes = forgetting_figure(replace(summary, points=far)).axes[0]
    assert axes.get_xscale() == "log" and axes.get_xlabel().endswith("log scale")
    assert len([text for text in axes.get_xticklabels() if text.get_text()]) >= 3


def test_every_set_of_control_texts_has_its_row(make_summary: MakeSummary, check_layout: Callable) -> None:
    summary = make_summary(points=5, control=1.0)
    sets = {"reviews": Estimate(20.0, 19.0, 21.0), "chat": Estimate(5.0, 4.0, 6.0)}
    figure = forgetting_figure(replace(summary, points=[replace(one, perplexities=sets) for one in summary.points]))
    below = [axes.get_xlabel().split(" [")[0] for axes in figure.axes]
    assert below == ["reviews perplexity"] * 2 + ["chat perplexity"] * 2
    assert figure.axes[0].get_ylabel() == figure.axes[2].get_ylabel() != figure.axes[1].get_ylabel()
    check_layout(figure)


@pytest.mark.parametrize("rewards", [1, 2, 3, 4])
def test_nothing_overlaps(make_summary: MakeSummary, rewards: int, check_layout: Callable) -> None:
    check_layout(kl_figure(make_summary(rewards=rewards, points=5)))


def test_lambda_is_written(make_summary: MakeSummary) -> None:
    axes = kl_figure(make_summary(points=5)).axes[0]
    assert {"SFT", "cheerful", "detailed"} <= {text.get_text() for text in axes.texts}
    assert any(text.get_text().startswith("λ = ") for text in axes.texts)

"""Hypervolumes of many rewards: approximations against exact values, and when which is taken."""

from __future__ import annotations

import numpy as np
import pytest
from progress_told import Told

from rewarded_lines.pareto import approximate_hypervolume as module
from rewarded_lines.pareto import comparison
from rewarded_lines.pareto.approximate_hypervolume import (
    affordable_contributions,
    approximate_gains,
    approximate_samples,
    approximation,
    careful,
    exact_seconds,
    samples_seconds,
)
from rewarded_lines.pareto.comparison import compare, method_volumes, sample_volumes
from rewarded_lines.pareto.hypervolume import contributions, hypervolume


def front(rewards: int, points: int = 20, samples: int = 12, seed: int = 0) -> np.ndarray:
    """Return a front of merges and its resamples, [samples, points, rewards]."""
    rng = np.random.default_rng(seed)
    weights = rng.dirichlet(np.ones(rewards), size=points)
    return np.asarray(weights + 0.6 * weights * (1 - weights) + 0.02 * rng.normal(size=(samples, points, rewards)))


@pytest.mark.parametrize("rewards", [1, 2, 3, 5, 8])
def test_one_box_by_hand(rewards: int) -> None:
    sides = np.arange(1.0, rewards + 1)
    assert hypervolume([sides - 2], [-2.0] * rewards) == pytest.approx(sides.prod())
    if rewards > 1:
        assert approximation([sides - 2], [-2.0] * rewards) == pytest.approx(sides.prod(), rel=0.05)


def test_two_boxes_in_eight_rewards_by_hand() -> None:
    # Two boxes of 2·1⁷ that share the unit cube: 2 + 2 − 1.
    points = np.ones((2, 8))
    points[0, 0] = points[1, 7] = 2
    assert hypervolume(points, np.zeros(8)) == pytest.approx(3)
    assert contributions(points, np.zeros(8)) == pytest.approx([1, 1])
    assert approximation(points, np.zeros(8)) == pytest.approx(3, rel=0.05)


@pytest.mark.parametrize("rewards", [4, 6, 8])
def test_an_approximation_is_near_the_exact_value(rewards: int) -> None:
    points = front(rewards)[0]
    low = points.min(axis=0) - 0.05
    exact = hypervolume(points, low)
    assert approximation(points, low) == pytest.approx(exact, rel=0.04)
    assert approximation(points, low) == approximation(points, low)
    # Whatever the rewards' units are.
    units = 10.0 ** np.arange(rewards)
    assert approximation(points * units, low * units) == pytest.approx(units.prod() * approximation(points, low))
    # Within four standard errors, which the repetitions give.
    mean, error = careful(points, low, limit=0.0)
    assert 0 < error < 0.02 and abs(mean / exact - 1) < 4 * error
    assert careful(points, low) == careful(points, low, limit=exact_seconds(20, rewards)) == (exact, 0.0)
    assert careful(points, points.max(axis=0), limit=0.0)[0] == 0.0


def test_approximated_resamples_have_the_exact_value_and_a_true_error() -> None:
    samples = front(8)
    low = samples.min(axis=1) - 0.05
    exact = np.array([hypervolume(*one) for one in zip(samples, low, strict=True)])
    found = approximate_samples(samples, low)
    assert found.values[0] == exact[0] and found.error == 0
    off = np.abs(found.values / exact - 1)
    assert found.resample_error == pytest.approx(off[1:9].max()) and off.max() < 0.04


def test_runs_are_approximated_each() -> None:
    samples = np.stack([front(7, seed=1), front(7, seed=2)], axis=1)
    low = samples.min(axis=2) - 0.05
    found = approximate_samples(samples, low)
    assert found.values.shape == (12, 2)
    assert found.values[0].tolist() == [hypervolume(samples[0, run], low[0, run]) for run in range(2)]
    assert (found.values[:, 1] == approximate_samples(samples[:, 1], low[:, 1]).values).all()


def test_contributions_of_many_points(monkeypatch: pytest.MonkeyPatch) -> None:
    points = front(8)[0]
    low = points.min(axis=0) - 0.05
    exact = contributions(points, low)
    assert affordable_contributions(points, low)[1] and (affordable_contributions(points, low)[0] == exact).all()
    monkeypatch.setattr(module, "LIMIT", 0.0)
    found, precise = affordable_contributions(points, low)
    assert not precise and found == pytest.approx(exact, abs=0.15 * exact.max())
    # What is dominated, there twice or below the reference adds nothing, and changes nothing else.
    more = np.vstack([points, points[0] - 0.01, low - 1, points[1]])
    again, _ = affordable_contributions(more, low)
    assert again[[1, 20, 21, 22]].tolist() == [0, 0, 0, 0]
    assert again[2:20] == pytest.approx(found[2:])
    assert affordable_contributions(points[:1], low)[0] == pytest.approx([hypervolume(points[:1], low)], rel=0.05)


def test_contributions_of_many_points_take_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LIMIT", 0.0)
    monkeypatch.setattr(module, "approximation", lambda *_, **__: pytest.fail("one for each point"))
    assert (affordable_contributions(front(6)[0], np.full(6, -0.5))[0] > 0).any()


def test_gains_of_many_candidates_take_one_pass() -> None:
    points, candidates = front(6)[0], front(6, seed=3)[1] + 0.02
    low, sides = points.min(axis=0) - 0.05, np.ptp(points, axis=0) + 0.05
    exact = np.array([hypervolume(np.vstack([points, one]), low) for one in candidates]) - hypervolume(points, low)
    whole, found = approximate_gains(points, candidates, low, sides)
    assert whole == pytest.approx(hypervolume(points, low), rel=0.04)
    assert found == pytest.approx(exact, abs=0.15 * exact.max()) and exact.max() > 0
    # A candidate that is dominated, or below the reference, adds nothing.
    assert approximate_gains(points, [points[0] - 0.01, low - 1], low, sides)[1].tolist() == [0, 0]


def test_the_cost_grows_with_points_and_rewards() -> None:
    assert exact_seconds(50, 8) == pytest.approx(0.042, rel=0.02)
    costs = [exact_seconds(points, 8) for points in (10, 50, 200)]
    assert costs == sorted(costs) and exact_seconds(200, 8) > 10 > exact_seconds(200, 6) * 100
    samples, rewards = front(8, points=30), front(2, points=30)
    assert samples_seconds(samples, samples.min(axis=1) - 1) == pytest.approx(12 * exact_seconds(30, 8), rel=0.5)
    # Nothing is above its own best, and two rewards cost nothing.
    assert samples_seconds(samples, samples.max(axis=1)) == pytest.approx(12 * exact_seconds(0, 8))
    assert samples_seconds(rewards, rewards.min(axis=1)) == 0


def test_what_costs_too_much_is_approximated_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    fronts = {"soup": front(8), "lines": front(8, seed=1) + 0.01}
    low = {"low": np.full((12, 8), -0.5)}
    exact = sample_volumes(fronts, low)
    monkeypatch.setattr(comparison, "LIMIT", 0.0)
    monkeypatch.setattr(comparison, "_NOTABLE", 0.0)
    told = Told()
    rough = sample_volumes(fronts, low, progress=told)
    assert told.totals == [24] and sum(count for count, _ in told.finished) == 24
    assert len(told.facts) == 1 and "the resamples are approximated" in told.facts[0]
    first, second = method_volumes(rough)
    assert first.error == 0 and 0 < first.resample_error < 0.05
    assert [one.hypervolume.value for one in (first, second)] == [exact[name]["low"].values[0] for name in fronts]
    assert compare(rough)[0].difference.value == compare(exact)[0].difference.value
    # By the user's word all are exact.
    again = method_volumes(sample_volumes(fronts, low, exact=True))
    assert again == method_volumes(exact) and all(one.error == one.resample_error == 0 for one in again)

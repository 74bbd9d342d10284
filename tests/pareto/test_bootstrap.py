"""The bootstrap against plain resampling, known limits and its own seed."""

from __future__ import annotations

import numpy as np
import pytest

from rewarded_lines.pareto.bootstrap import (
    Estimate,
    estimate_samples,
    interval,
    resample_means,
    resample_runs,
    run_average,
    wilson,
)


def scores(points: int = 3, prompts: int = 40, rewards: int = 2, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(points, prompts, rewards))


def test_resample_means_is_the_mean_of_the_drawn_prompts() -> None:
    # With one-hot scores the means are the counts themselves, over the number of prompts.
    prompts = 5
    counts = resample_means(np.eye(prompts)[None], 50, seed=3)[:, 0] * prompts
    assert np.allclose(counts, counts.round())
    assert np.allclose(counts.sum(axis=1), prompts)
    values = scores(2, prompts, 3)
    expected = np.array([[row @ point / prompts for point in values] for row in counts])
    assert np.allclose(resample_means(values, 50, seed=3), expected)


def test_every_point_sees_the_same_resamples() -> None:
    values = scores(1)
    shifted = np.concatenate([values, values + 2.5])
    means = resample_means(shifted, 100, seed=0)
    assert np.allclose(means[:, 1] - means[:, 0], 2.5)


def test_the_same_seed_gives_the_same_resamples_and_another_does_not() -> None:
    values = scores()
    assert (resample_means(values, 20, seed=4) == resample_means(values, 20, seed=4)).all()
    assert (resample_means(values, 20, seed=4) != resample_means(values, 20, seed=5)).any()


def test_the_spread_is_the_standard_error() -> None:
    values = scores(1, 400, 1)
    means = resample_means(values, 4000, seed=0)[:, 0, 0]
    assert means.mean() == pytest.approx(values.mean(), abs=0.005)
    assert means.std() == pytest.approx(values.std() / 20, rel=0.05)


def test_interval_by_hand() -> None:
    assert interval(np.arange(101.0), level=0.9) == pytest.approx([5.0, 95.0])
    both = interval(np.arange(101.0)[:, None] * [1.0, 2.0], level=0.5)
    assert both == pytest.approx(np.array([[25.0, 50.0], [75.0, 150.0]]))


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    trials = np.random.default_rng(0).normal(size=(2000, 100, 1))
    low, high = interval(resample_means(trials, 1000, seed=0))
    # A percentile interval of 100 normal values covers a little less than it says.
    assert 0.92 <= ((low <= 0) & (high >= 0)).mean() <= 0.96


def test_one_run_is_the_bootstrap_over_prompts() -> None:
    values = scores()
    samples = resample_runs([values], 30, seed=4)
    assert (samples.means[0, 0] == values.mean(axis=1)).all()
    assert (samples.means[1:, 0] == resample_means(values, 30, seed=4)).all()
    assert (samples.drawn == 1).all()
    assert (run_average(samples.means, samples.drawn) == samples.means[:, 0]).all()


def test_runs_share_the_draw_of_prompts() -> None:
    values = scores()
    samples = resample_runs([values, values + 1, 2 * values], 30, seed=0)
    assert np.allclose(samples.means[:, 1], samples.means[:, 0] + 1)
    assert np.allclose(samples.means[:, 2], 2 * samples.means[:, 0])
    assert (samples.means[1:, 0] == resample_means(values, 30, seed=0)).all()


def test_runs_with_other_prompts_get_a_draw_of_their_own() -> None:
    first, second = scores(prompts=40), scores(prompts=30, seed=2)
    samples = resample_runs([first, second, first], 30, seed=0)
    assert (samples.means[1:, 0] == resample_means(first, 30, seed=0)).all()
    assert (samples.means[:, 2] == samples.means[:, 0]).all()
    assert (samples.means[1:, 1] != resample_means(second, 30, seed=0)).any()
    assert np.allclose(samples.means[0, 1], second.mean(axis=1))


def test_runs_are_drawn_with_replacement() -> None:
    drawn = resample_runs([scores(), scores(seed=2), scores(seed=3)], 4000, seed=0).drawn
    assert (drawn[0] == 1).all()
    assert (drawn.sum(axis=1) == 3).all()
    assert drawn[1:].mean(axis=0) == pytest.approx([1, 1, 1], abs=0.05)
    # Binomial(3, 1/3): a run is left out of (2/3)³ of the resamples.
    assert (drawn[1:] == 0).mean() == pytest.approx(8 / 27, abs=0.02)


def test_the_draws_of_runs_and_of_prompts_are_not_the_same() -> None:
    # With as many prompts as runs one stream for both would draw the same counts.
    prompts = np.eye(3)[None]
    samples = resample_runs([prompts, prompts, prompts], 200, seed=0)
    counts = samples.means[1:, 0, 0] * 3
    assert abs(np.corrcoef(counts[:, 0], samples.drawn[1:, 0])[0, 1]) < 0.2


def test_which_runs_are_drawn_depends_on_the_seed_alone() -> None:
    runs = [scores(), scores(seed=2)]
    other = [scores(points=1), scores(points=1, seed=5)]
    assert (resample_runs(runs, 50, seed=1).drawn == resample_runs(other, 50, seed=1).drawn).all()
    assert (resample_runs(runs, 50, seed=1).drawn != resample_runs(runs, 50, seed=2).drawn).any()


def test_the_spread_between_runs_widens_the_interval() -> None:
    rng = np.random.default_rng(0)
    offsets = rng.normal(size=8)
    runs = [offset + rng.normal(size=(1, 400, 1)) for offset in offsets]
    samples = resample_runs(runs, 4000, seed=0)
    averages = run_average(samples.means, samples.drawn)[:, 0, 0]
    assert averages[0] == pytest.approx(np.mean(runs))
    # The variance of a mean of 8 runs, and that of a mean of 400 prompts: those of 8 runs, averaged.
    between, within = np.var([run.mean() for run in runs]) / 8, np.mean(runs, axis=0).var() / 400
    assert averages[1:].var() == pytest.approx(between + within, rel=0.1)


def test_run_average_by_hand() -> None:
    assert run_average([[1.0, 4.0], [1.0, 4.0]], [[1, 1], [0, 2]]).tolist() == [2.5, 4.0]
    assert run_average(np.ones((2, 3, 4, 5)), np.ones((2, 3))).shape == (2, 4, 5)
    with pytest.raises(ValueError, match="draws of shape"):
        run_average(np.ones((2, 3)), np.ones((2, 2)))


def test_runs_that_do_not_fit_are_refused() -> None:
    for runs in ([], [scores(points=2), scores(points=3)], [scores(), scores(rewards=1)], [np.zeros(())]):
        with pytest.raises(ValueError, match="expected"):
            resample_runs(runs, 10, seed=0)


def test_estimate_samples_takes_the_first_row_for_the_value() -> None:
    low, high = interval(np.arange(101.0), level=0.9)
    assert estimate_samples([7.0, *range(101)], level=0.9) == Estimate(7.0, low, high)


def test_inputs_are_left_as_they_were() -> None:
    values = scores()
    before = values.copy()
    resample_means(values, 10, seed=0)
    assert (values == before).all()


@pytest.mark.parametrize("shape", [(3, 4), (3, 0, 2)])
def test_scores_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"points, prompts, rewards"):
        resample_means(np.zeros(shape), 10, seed=0)


def test_other_mistakes_are_refused() -> None:
    with pytest.raises(ValueError, match="resamples"):
        resample_means(scores(), 0, seed=0)
    with pytest.raises(ValueError, match="level"):
        interval(np.zeros(3), level=1.0)


def test_wilsons_interval_has_the_textbooks_values():
    # Newcombe 1998, table I: 81 of 263, and 0 of 20.
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)

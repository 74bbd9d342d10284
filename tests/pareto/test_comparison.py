"""Methods compared: numbers by hand, pairing, several runs, and the case of one run."""

from __future__ import annotations

import numpy as np
import pytest

from rewarded_lines.pareto.bootstrap import estimate_samples, resample_means, resample_runs
from rewarded_lines.pareto.comparison import compare, method_volumes, sample_volumes
from rewarded_lines.pareto.hypervolume import hypervolume, hypervolumes

ORIGIN = {"origin": np.zeros((3, 2))}


def boxes(*sides: float) -> np.ndarray:
    """Return one point per sample, whose hypervolume above 0 is the square of its side."""
    return np.array(sides)[:, None, None] * np.ones((1, 1, 2))


def fronts(seed: int, points: int = 5, prompts: int = 60, gain: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    lam = np.linspace(0, 1, points)
    means = np.stack([lam + gain, 1 - lam + gain], axis=1)
    return np.asarray(means[:, None] + rng.normal(size=(1, prompts, 2)) + 0.1 * rng.normal(size=(points, prompts, 2)))


def test_differences_by_hand() -> None:
    volumes = sample_volumes({"soup": boxes(2, 2, 3), "lines": boxes(3, 1, 4)}, ORIGIN)
    assert volumes["lines"]["origin"].values == pytest.approx([9, 1, 16])
    (found,) = compare(volumes)
    assert (found.method, found.other, found.reference) == ("lines", "soup", "origin")
    assert found.difference == estimate_samples([5.0, -3.0, 7.0])
    assert found.share_positive == 0.5
    assert found.relative == 1.25
    first, second = method_volumes(volumes)
    assert (first.method, first.reference, first.hypervolume) == (
        "soup",
        "origin",
        estimate_samples([4.0, 4.0, 9.0]),
    )
    assert second.hypervolume.value == pytest.approx(9)


def test_every_pair_and_reference_in_order() -> None:
    three = {"a": boxes(1, 1, 1), "b": boxes(2, 2, 2), "c": boxes(3, 3, 3)}
    volumes = sample_volumes(three, {**ORIGIN, "half": np.full((3, 2), 0.5)})
    found = [(each.other, each.method, each.reference) for each in compare(volumes)]
    pairs = [("a", "b"), ("a", "c"), ("b", "c")]
    assert found == [(*pair, reference) for pair in pairs for reference in ("origin", "half")]


def test_nothing_to_compare_with_has_no_relative_difference() -> None:
    (found,) = compare(sample_volumes({"none": boxes(-1, 1, 1), "some": boxes(1, 1, 1)}, ORIGIN))
    assert found.relative is None
    assert found.difference.value == 1.0
    # The resamples are equal, and equal is not more.
    assert found.share_positive == 0.0


def test_what_moves_both_methods_alike_cancels() -> None:
    scores = np.concatenate([fronts(0), fronts(0, gain=0.2)])
    means = np.concatenate([scores.mean(axis=1)[None], resample_means(scores, 300, seed=0)])
    worst = {"worst": means.min(axis=1) - 0.5}
    volumes = sample_volumes({"one": means[:, :5], "two": means[:, 5:]}, worst)
    alone = method_volumes(volumes)[0].hypervolume
    (found,) = compare(volumes)
    assert found.share_positive == 1.0
    assert found.difference.low > 0
    assert found.difference.high - found.difference.low < alone.high - alone.low


def test_each_sample_is_measured_above_its_own_reference() -> None:
    rng = np.random.default_rng(0)
    means, reference = rng.normal(size=(4, 6, 3)), rng.normal(size=(4, 3)) - 2
    found = sample_volumes({"one": means}, {"own": reference})["one"]["own"].values
    assert found == pytest.approx([hypervolume(means[b], reference[b]) for b in range(4)])


def test_one_run_equals_no_runs() -> None:
    scores = fronts(1)
    samples = resample_runs([scores], 50, seed=2)
    alone = np.concatenate([scores.mean(axis=1)[None], resample_means(scores, 50, seed=2)])
    with_runs = sample_volumes({"one": samples.means}, {"zero": np.zeros((51, 1, 2))}, samples.drawn)
    without = sample_volumes({"one": alone}, {"zero": np.zeros((51, 2))})
    assert (with_runs["one"]["zero"].values == without["one"]["zero"].values).all()


def test_several_runs_are_averaged_as_drawn() -> None:
    samples = resample_runs([fronts(1), fronts(2), fronts(3)], 20, seed=0)
    references = samples.means.min(axis=2) - 0.1
    found = sample_volumes({"one": samples.means}, {"own": references}, samples.drawn)["one"]["own"].values
    volumes = hypervolumes(samples.means, references)
    assert found[0] == pytest.approx(volumes[0].mean())
    # Written out as the bootstrap draws: every drawn run, as often as it came.
    for sample in range(21):
        copies = np.repeat(volumes[sample], samples.drawn[sample])
        assert found[sample] == pytest.approx(copies.mean())


def test_the_order_of_the_points_does_not_matter() -> None:
    means = np.random.default_rng(0).normal(size=(3, 6, 2))
    forth, back = sample_volumes({"f": means, "b": means[:, ::-1]}, {"low": np.full((3, 2), -3.0)}).values()
    assert forth["low"].values == pytest.approx(back["low"].values)


def test_swapping_the_methods_turns_the_difference() -> None:
    rng = np.random.default_rng(0)
    one, two, low = rng.normal(size=(40, 5, 2)), rng.normal(size=(40, 5, 2)), {"low": np.full((40, 2), -4.0)}
    (forth,) = compare(sample_volumes({"a": one, "b": two}, low))
    (back,) = compare(sample_volumes({"b": two, "a": one}, low))
    assert forth.difference.value == -back.difference.value
    assert (forth.difference.low, forth.share_positive) == pytest.approx(
        (-back.difference.high, 1 - back.share_positive)
    )


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="expected"):
        sample_volumes({"a": boxes(1, 2, 3)}, {"short": np.zeros((2, 2))})
    # With runs, the draws must be given; without, there are none.
    with pytest.raises(ValueError, match="one value"):
        sample_volumes({"a": np.ones((3, 2, 4, 2))}, {"low": np.zeros((3, 2, 2))})
    with pytest.raises(ValueError, match="one value"):
        sample_volumes({"a": boxes(1)}, {"low": np.zeros((1, 2))})
    with pytest.raises(ValueError, match="draws"):
        sample_volumes({"a": boxes(1, 2, 3)}, ORIGIN, np.ones((3, 1)))

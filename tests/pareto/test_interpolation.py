"""Between evaluated λ: values by hand, and the optimum against a fine grid."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewarded_lines.pareto.choice import weighted_rule
from rewarded_lines.pareto.hypervolume import hypervolume
from rewarded_lines.pareto.interpolation import DENSE, interpolate, mixed_hypervolume
from rewarded_lines.pareto.interpolation import best_interpolated as best_along

LAMS = [0.0, 0.5, 1.0]
MEANS = [[0.0, 10.0], [2.0, 8.0], [3.0, 0.0]]


def best_candidate(means, weights, minima=None, **units):
    return weighted_rule(weights, minima, **units).choose(means)


def best_interpolated(lams, means, weights, minima=None, **units):
    return best_along(lams, means, weighted_rule(weights, minima, **units))


def curve(seed: int, points: int = 6, rewards: int = 3) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.permutation(np.linspace(0, 1, points)), rng.integers(-5, 6, size=(points, rewards)).astype(float)


def test_interpolate_by_hand() -> None:
    assert interpolate(LAMS, MEANS, 0.25) == pytest.approx([1.0, 9.0])
    assert interpolate(LAMS, MEANS, [0.75, 0.9]) == pytest.approx(np.array([[2.5, 4.0], [2.8, 1.6]]))


def test_interpolate_is_exact_at_the_evaluated_points_in_any_order() -> None:
    lams, means = curve(0)
    assert (interpolate(lams, means, lams) == means).all()


def test_interpolate_takes_resampled_means_too() -> None:
    lams, means = curve(0)
    resampled = np.stack([means, means + 1])
    assert interpolate(lams, resampled, 0.3) == pytest.approx(interpolate(lams, means, 0.3) + [[0.0], [1.0]])
    assert interpolate(lams, resampled, [0.3, 0.4]).shape == (2, 2, 3)


def test_the_optimum_at_a_crossing_by_hand() -> None:
    # On the second segment the second reward is 8 − 16(λ − ½): 4 at λ = ¾.
    found = best_interpolated(LAMS, MEANS, [1, 0], {1: 4.0})
    assert (found.lam, found.value, found.qualifies, found.shortfalls) == (0.75, 2.5, True, {1: 0.0})
    assert found.means == (2.5, 4.0)


def test_the_optimum_at_an_evaluated_point_by_hand() -> None:
    assert best_interpolated(LAMS, MEANS, [1, 0]).lam == 1.0
    assert best_interpolated(LAMS, MEANS, [0, 1]).lam == 0.0
    found = best_interpolated(LAMS, MEANS, [1, 1], centre=[0, 5], scale=[1, 4])
    assert (found.lam, found.value) == (0.5, 2.75)


def test_the_nearest_where_two_shortfalls_cross_by_hand() -> None:
    # Minima 3 and 8: on the second segment they are missed by 1 − 2t and 8t, equal at t = 0.1.
    found = best_interpolated(LAMS, MEANS, [1, 0], {0: 3.0, 1: 8.0})
    assert not found.qualifies
    assert found.lam == pytest.approx(0.5 + 0.5 / 9)
    assert found.shortfalls == pytest.approx({0: 8 / 9, 1: 8 / 9})
    nearer = best_interpolated(LAMS, MEANS, [1, 0], {0: 3.0, 1: 8.0}, scale=[1, 8])
    # Missed by 1 − t and t.
    assert nearer.shortfalls == pytest.approx({0: 0.5, 1: 4.0})


def test_a_level_piece_gives_its_smallest_lam() -> None:
    assert best_interpolated([0, 1], [[1.0], [1.0]], [1]).lam == 0.0


@settings(max_examples=100)
@given(st.integers(0, 2**32 - 1), st.integers(-5, 5), st.integers(-5, 5))
def test_no_grid_finds_better(seed: int, first: int, second: int) -> None:
    lams, means = curve(seed)
    minima, weights, scale = {0: float(first), 2: float(second)}, [0.2, 1.0, 0.3], [1.0, 2.0, 3.0]
    found = best_interpolated(lams, means, weights, minima, scale=scale)
    assert interpolate(lams, means, found.lam) == pytest.approx(np.array(found.means))
    grid = interpolate(lams, means, np.linspace(0, 1, 2001))
    best = best_candidate(grid, weights, scale=scale)
    within = grid[(grid[:, 0] >= first) & (grid[:, 2] >= second)]
    if len(within):
        assert found.qualifies
        assert found.value >= best_candidate(within, weights, scale=scale).value - 1e-9
        assert found.value <= best.value + 0.1
    elif not found.qualifies:
        nearest = best_candidate(grid, weights, minima, scale=scale)
        worst = max(found.shortfalls[0], found.shortfalls[2] / 3)
        assert worst <= max(nearest.shortfalls[0], nearest.shortfalls[2] / 3) + 1e-9


@settings(max_examples=100)
@given(st.integers(0, 2**32 - 1), st.floats(-5, 5), st.floats(0, 4))
def test_relaxing_a_minimum_never_lowers_the_optimum(seed: int, bound: float, slack: float) -> None:
    lams, means = curve(seed)
    strict = best_interpolated(lams, means, [0, 1, 0], {0: bound})
    relaxed = best_interpolated(lams, means, [0, 1, 0], {0: bound - slack})
    if strict.qualifies:
        assert relaxed.qualifies
        assert relaxed.value >= strict.value - 1e-8
        assert strict.means[0] >= bound


@settings(max_examples=60)
@given(st.integers(0, 2**32 - 1), st.integers(-5, 5))
def test_the_curve_is_never_worse_than_its_points(seed: int, bound: int) -> None:
    lams, means = curve(seed)
    points, between = (
        best_candidate(means, [0, 1, 0], {0: bound}),
        best_interpolated(lams, means, [0, 1, 0], {0: bound}),
    )
    if points.qualifies:
        assert between.qualifies
        assert between.value >= points.value
    else:
        assert between.shortfalls[0] <= points.shortfalls[0]


def test_the_order_of_the_points_does_not_matter() -> None:
    lams, means = curve(3)
    back = best_interpolated(lams[::-1], means[::-1], [1, 1, 1], {0: 1.0})
    assert back == best_interpolated(lams, means, [1, 1, 1], {0: 1.0})


@pytest.mark.parametrize(
    ("lams", "means", "lam"),
    [
        ([0.0], [[1.0]], 0.0),
        ([0.0, 0.0], [[1.0], [2.0]], 0.0),
        ([0.0, 1.0], [[1.0]], 0.5),
        ([0.0, 1.0], [[1.0], [np.inf]], 0.5),
        ([0.0, 1.0], [[1.0], [2.0]], 1.1),
        ([0.0, 1.0], [[1.0], [2.0]], np.nan),
    ],
)
def test_mistakes_are_refused(lams: list[float], means: list[list[float]], lam: float) -> None:
    with pytest.raises(ValueError, match=r"expected|twice|finite|outside"):
        interpolate(lams, means, lam)


def test_other_mistakes_of_the_optimum_are_refused() -> None:
    with pytest.raises(ValueError, match="no reward"):
        best_interpolated(LAMS, MEANS, [1, 0], {2: 0.0})
    with pytest.raises(ValueError, match="points, rewards"):
        best_interpolated(LAMS, np.zeros((2, 3, 2)), [1, 0])


def test_the_hypervolume_of_a_straight_line_is_its_triangle() -> None:
    found = mixed_hypervolume([1.0, 0.0], [[0.0, 2.0], [3.0, 0.0]], [0.0, 0.0])
    # Each of the n equal steps leaves out a triangle of 3/n².
    assert found == pytest.approx(3.0 * (1 - 1 / DENSE), rel=1e-9)


def test_a_mixed_front_holds_every_evaluated_point_and_no_more_than_their_corner() -> None:
    rng = np.random.default_rng(3)
    for _ in range(20):
        lams, means = np.linspace(0, 1, 7), rng.random((7, 2))
        corner = means.max(axis=0)
        volume = mixed_hypervolume(lams, means, [0.0, 0.0])
        assert hypervolume(means, [0.0, 0.0]) <= volume <= corner.prod()

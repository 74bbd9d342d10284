"""The next preference: by hand, on the simplex, against noise, and compared with grids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewarded_lines.merger.spec import simplex_grid
from rewarded_lines.pareto import next_point
from rewarded_lines.pareto.hypervolume import hypervolume
from rewarded_lines.pareto.next_point import Proposal, next_weights

Curve = Callable[[np.ndarray], np.ndarray]
ENDS = [[0.0, 1.0], [1.0, 0.0]]


def line(*lams: float) -> np.ndarray:
    return np.array([[lam, 1 - lam] for lam in lams])


def straight(weights: np.ndarray) -> np.ndarray:
    return weights * [2.0, 8.0]


def search(scores: Curve, start: np.ndarray, reference: Sequence[float], points: int) -> np.ndarray:
    places = start
    while len(places) < points:
        proposal = next_weights(places, scores(places), reference)
        if proposal is None:
            break
        places = np.vstack([places, proposal.weights])
    return places


def test_the_first_step_is_the_middle_by_hand() -> None:
    # Without slack the most between the ends is [1, 1], and the ends have no volume above 0.
    found = next_weights(ENDS, [[0, 1], [1, 0]], [0, 0], slack=0)
    assert found == Proposal((0.5, 0.5), 1.0, (0, 1))
    # Slack adds a fifth of the range of each reward for a gap of 1.
    assert next_weights(ENDS, [[0, 1], [1, 0]], [0, 0], slack=0.2) == Proposal((0.5, 0.5), pytest.approx(1.44), (0, 1))


def test_the_larger_rectangle_wins_by_hand() -> None:
    # Between the first two, 1 × 1 is missing; between the last two, 2 × 7.
    means = [[0.0, 8.0], [1.0, 7.0], [3.0, 0.0]]
    found = next_weights(line(0, 0.5, 1), means, [0, 0], slack=0)
    assert found == Proposal((0.75, 0.25), pytest.approx(14.0), (1, 2))


def test_one_reward_is_searched_next_to_its_best() -> None:
    assert next_weights(line(0, 1), [[1.0], [1.0]], [0.0]) is None
    found = next_weights(line(0, 0.5, 1), [[1.0], [2.0], [2.5]], [0.0], slack=0.2)
    assert found is not None
    assert found.weights == (0.75, 0.25)


def test_points_all_equal_or_below_the_reference_end_the_search() -> None:
    assert next_weights(line(0, 0.3, 1), np.ones((3, 2)), [0, 0]) is None
    assert next_weights(line(0, 0.3, 1), [[1, -9], [1, -8], [2, -9]], [0, 0]) is None


def test_neighbours_nearer_than_the_gap_are_left_alone() -> None:
    places = line(0, 0.25, 0.5, 0.75, 1)
    assert next_weights(places, straight(places), [0, 0], min_gap=0.25) is None
    assert next_weights(places, straight(places), [0, 0], min_gap=0.24) is not None
    assert next_weights(line(0.5, 0.5001), straight(line(0.5, 0.5001)), [0, 0], min_gap=0) is None


def test_a_preference_under_way_is_skipped_for_the_next_best() -> None:
    places = line(0, 0.5, 1)
    proposals: list[tuple[float, ...]] = []
    while (found := next_weights(places, straight(places), [0, 0], proposals)) is not None:
        proposals.append(found.weights)
    # Equal potentials: the lexical order of the weights.
    assert proposals == [(0.25, 0.75), (0.75, 0.25)]


def test_weights_have_four_decimals_and_sum_to_one() -> None:
    thirds = [[1 / 3, 1 / 3, 1 / 3], [1.0, 0.0, 0.0]]
    found = next_weights(thirds, [[0, 1], [1, 0]], [-1, -1])
    assert found is not None
    assert found.weights == (0.6667, 0.1667, 0.1666)
    assert round(sum(found.weights), 9) == 1


def test_two_points_almost_equal_are_not_chased() -> None:
    # Noise of 0.02 between λ = 0.5 and 0.55; the front is still open on both sides.
    places = line(0, 0.5, 0.55, 1)
    means = straight(places)
    means[1:3] = means[1] + [[0.02, 0.0], [0.0, 0.02]]
    found = next_weights(places, means, [0, 0])
    assert found is not None
    assert found.between != (1, 2)
    near = hypervolume(np.vstack([means, means[1:3].max(axis=0)]), [0, 0]) - hypervolume(means, [0, 0])
    assert near < 0.01 * found.potential


def test_a_wide_gap_whose_end_seems_dominated_is_still_entered() -> None:
    # By noise the last point lies below the middle on both rewards; half of the line is unseen.
    places = line(0, 0.125, 0.25, 0.375, 0.5, 1)
    means = np.array([[0.0, 8.0], [0.4, 7.8], [0.8, 7.4], [1.1, 6.8], [1.4, 6.0], [1.3, 5.9]])
    found = next_weights(places, means, [0, 0])
    assert found is not None
    assert found.between == (4, 5)
    # Without slack every other gap comes first, and this one never.
    without = next_weights(places, means, [0, 0], slack=0)
    assert without is not None
    assert without.between != (4, 5)


def test_the_corners_of_the_simplex_lead_to_its_edges() -> None:
    found = search(np.sqrt, np.eye(3), [-0.1] * 3, 15)
    assert sorted(found[3].tolist()) == [0.0, 0.5, 0.5]
    for policy in range(3):
        assert ((found[3:, policy] == 0) & (found[3:] > 0).any(axis=1)).any()


def test_with_three_policies_the_search_finds_more_than_a_grid_of_as_many() -> None:
    def scores(weights: np.ndarray) -> np.ndarray:
        return np.asarray(1 - (1 - weights) ** [1.5, 2.0, 2.5])

    low, start = [-0.02] * 3, np.vstack([np.eye(3), np.full((1, 3), 1 / 3)])
    grid = np.array(simplex_grid(3, 5))
    assert len(grid) == 15
    assert hypervolume(scores(search(scores, start, low, 15)), low) > 1.1 * hypervolume(scores(grid), low)


def test_a_middle_does_not_hide_the_edges() -> None:
    places = np.vstack([np.eye(3), np.full((1, 3), 1 / 3)])
    found: list[tuple[float, ...]] = []
    while (proposal := next_weights(places, np.sqrt(places), [-0.1] * 3, found)) is not None:
        found.append(proposal.weights)
    assert {(0.5, 0.5, 0.0), (0.5, 0.0, 0.5), (0.0, 0.5, 0.5)} < set(found)
    assert len(found) == 6


def test_a_point_in_between_parts_the_ends() -> None:
    places = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.5, 0.5, 0.0]])
    means = np.array([[1.0, 0.0], [0.0, 1.0], [0.1, 0.1]])
    # Dominated, but evaluated: its own middle would be proposed twice otherwise.
    assert next_weights(places, means, [0, 0]).between in [(0, 2), (1, 2)]  # type: ignore[union-attr]


@pytest.mark.parametrize(("policies", "points"), [(2, 30), (3, 60), (5, 40)])
def test_neighbours_are_those_of_the_definition(policies: int, points: int) -> None:
    rng = np.random.default_rng(policies)
    places = rng.dirichlet(np.ones(policies), size=points)
    # Some on faces, some twice, and the corners.
    places[::3, 0] = 0
    places = np.vstack([places / places.sum(axis=1, keepdims=True), np.eye(policies), places[1]])

    def between(one: int, other: int, point: int) -> bool:
        inside = (places[point] - places[one]) @ (places[point] - places[other]) < -next_point.ROUNDING
        return bool(inside) and not ((places[point] > 0) & (places[one] == 0) & (places[other] == 0)).any()

    every = range(len(places))
    expected = [
        (one, other)
        for one, other in combinations(every, 2)
        if np.abs(places[one] - places[other]).max() > 0.05 and not any(between(one, other, point) for point in every)
    ]
    assert len(expected) > points / 4 and list(next_point._neighbours(places, 0.05)) == expected


def test_many_rewards_are_approximated_with_one_proposal_as_the_exact_one(monkeypatch: pytest.MonkeyPatch) -> None:
    places = np.random.default_rng(0).dirichlet(np.ones(6), size=12)
    exact = next_weights(places, np.sqrt(places), [-0.1] * 6)
    monkeypatch.setattr(next_point, "PATIENCE", 0.0)
    monkeypatch.setattr(next_point, "hypervolume", lambda *_: pytest.fail("one for each neighbour"))
    found = next_weights(places, np.sqrt(places), [-0.1] * 6)
    assert exact is not None and found is not None
    assert found.potential == pytest.approx(exact.potential, rel=0.15)


@settings(max_examples=50)
@given(st.integers(0, 2**32 - 1), st.integers(2, 4), st.integers(1, 3))
def test_a_proposal_is_new_on_the_simplex_and_between_its_ends(seed: int, policies: int, rewards: int) -> None:
    rng = np.random.default_rng(seed)
    places, means = rng.dirichlet(np.ones(policies), size=7), rng.normal(size=(7, rewards))
    found = next_weights(places, means, np.full(rewards, -4.0))
    if found is None:
        return
    assert found.potential > 0
    assert round(sum(found.weights), 9) == 1
    assert min(found.weights) >= 0
    one, other = found.between
    assert np.abs(np.array(found.weights) - (places[one] + places[other]) / 2).max() <= 1e-4
    assert found.weights not in [tuple(place) for place in places.round(4).tolist()]
    assert next_weights(places, means, np.full(rewards, -4.0), [found.weights]) != found
    # Deterministic, and blind to the order of the points.
    order = rng.permutation(7)
    again = next_weights(places[order], means[order], np.full(rewards, -4.0))
    assert again is not None
    assert again.weights == found.weights
    assert {order[index] for index in again.between} == set(found.between)


@settings(max_examples=50)
@given(st.integers(0, 2**32 - 1), st.floats(0, 1), st.floats(0, 1))
def test_more_slack_never_lowers_the_potential(seed: int, slack: float, more: float) -> None:
    rng = np.random.default_rng(seed)
    places, means = line(*rng.permutation(np.linspace(0, 1, 6))), rng.normal(size=(6, 2))
    low, high = (next_weights(places, means, [-3, -3], slack=each) for each in (slack, slack + more))
    if low is not None:
        assert high is not None
        assert high.potential >= low.potential - 1e-9


@pytest.mark.parametrize("noise", [0.0, 0.05, 0.2])
def test_fifteen_points_come_near_the_front_of_a_grid(noise: float) -> None:
    """Reach, on smooth fronts, the volume that interpolating 101 evaluated points would show."""
    rng, grid = np.random.default_rng(0), np.linspace(0, 1, 101)
    kernel = np.exp(-0.5 * ((grid[:, None] - grid) / 0.2) ** 2) + 1e-8 * np.eye(101)
    shares = []
    for _ in range(20):
        first, second = rng.uniform(1, 3, size=2)
        curve = np.stack([2.4 * (1 - (1 - grid) ** first), 8 * (1 - grid**second)], axis=1)
        curve += noise * np.linalg.cholesky(kernel) @ rng.normal(size=(101, 2))

        def scores(weights: np.ndarray, curve: np.ndarray = curve) -> np.ndarray:
            return np.stack([np.interp(weights[:, 0], grid, column) for column in curve.T], axis=1)

        found = search(scores, line(0, 0.5, 1), [0, 0], 15)
        order = np.argsort(found[:, 0])
        between = np.stack([np.interp(grid, found[order, 0], column) for column in scores(found)[order].T], axis=1)
        shares.append(hypervolume(between, [0, 0]) / hypervolume(curve, [0, 0]))
    assert np.mean(np.array(shares) >= 0.99) >= 0.9


@pytest.mark.parametrize(
    "mistake",
    [
        lambda: next_weights([[1.0], [1.0]], np.zeros((2, 2)), [0, 0]),
        lambda: next_weights([[0.5, 0.6], [1, 0]], np.zeros((2, 2)), [0, 0]),
        lambda: next_weights([[-0.5, 1.5], [1, 0]], np.zeros((2, 2)), [0, 0]),
        lambda: next_weights(ENDS, np.zeros((3, 2)), [0, 0]),
        lambda: next_weights(ENDS, np.zeros((2, 2)), [0]),
        lambda: next_weights(ENDS, np.full((2, 2), np.nan), [0, 0]),
        lambda: next_weights(ENDS, np.zeros((2, 2)), [0, 0], min_gap=-1),
        lambda: next_weights(ENDS, np.zeros((2, 2)), [0, 0], slack=-1),
    ],
)
def test_mistakes_are_refused(mistake: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=r"expected|simplex|negative|reference|finite"):
        mistake()

"""Dominance and hypervolume against values by hand and an exact oracle."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from rewarded_lines.pareto import hypervolume as module
from rewarded_lines.pareto.hypervolume import contributions, hypervolume, hypervolumes, nondominated


def clouds(rewards: int, largest: int = 7) -> st.SearchStrategy[np.ndarray]:
    """Draw points on a coarse grid: ties and copies are frequent, and some lie below the reference 0."""
    numbers = st.integers(-2, 8).map(float)
    return st.integers(1, largest).flatmap(lambda count: arrays(np.float64, (count, rewards), elements=numbers))


def oracle(points: np.ndarray, reference: np.ndarray) -> float:
    """Return the volume of the union of boxes by inclusion and exclusion over every subset of the points."""
    boxes = points[(points > reference).all(axis=1)]
    total = 0.0
    for size in range(1, len(boxes) + 1):
        for subset in combinations(range(len(boxes)), size):
            shared = boxes[list(subset)].min(axis=0) - reference
            total += (-1) ** (size + 1) * float(shared.prod())
    return total


def test_nondominated_by_hand() -> None:
    points = [[1, 3], [2, 2], [3, 1], [1, 1], [2, 1]]
    assert nondominated(points).tolist() == [True, True, True, False, False]


def test_nondominated_keeps_all_copies() -> None:
    assert nondominated([[1, 2], [1, 2], [0, 2]]).tolist() == [True, True, False]


def test_nondominated_of_one_reward_is_its_best() -> None:
    assert nondominated([[1], [3], [2]]).tolist() == [False, True, False]


def test_nondominated_of_nothing() -> None:
    assert nondominated(np.zeros((0, 2))).shape == (0,)


@pytest.mark.parametrize(
    ("points", "reference", "expected"),
    [
        ([[3.0]], [1.0], 2.0),
        ([[2.0, 3.0]], [0.0, 0.0], 6.0),
        ([[1.0, 3.0], [2.0, 2.0], [3.0, 1.0]], [0.0, 0.0], 6.0),
        ([[1.0, 3.0], [3.0, 1.0]], [-1.0, -1.0], 12.0),
        ([[1.0, 2.0, 3.0]], [0.0, 0.0, 0.0], 6.0),
        ([[1.0, 1.0, 2.0], [2.0, 1.0, 1.0]], [0.0, 0.0, 0.0], 3.0),
        ([[1.0, 1.0, 1.0, 2.0]], [0.0, 0.0, 0.0, 0.0], 2.0),
    ],
)
def test_hypervolume_by_hand(points: list[list[float]], reference: list[float], expected: float) -> None:
    assert hypervolume(points, reference) == pytest.approx(expected)


@pytest.mark.parametrize("point", [[1.0, -1.0], [0.0, 5.0], [-1.0, -1.0], [0.0, 0.0]])
def test_a_point_that_does_not_dominate_the_reference_adds_nothing(point: list[float]) -> None:
    assert hypervolume([point], [0.0, 0.0]) == 0.0
    assert hypervolume([[2.0, 3.0], point], [0.0, 0.0]) == 6.0


def test_no_points_have_no_hypervolume() -> None:
    assert hypervolume(np.zeros((0, 2)), [0.0, 0.0]) == 0.0


@pytest.mark.parametrize("rewards", [1, 2, 3, 4])
def test_hypervolume_equals_the_oracle(rewards: int) -> None:
    @settings(max_examples=60)
    @given(clouds(rewards))
    def check(points: np.ndarray) -> None:
        reference = np.zeros(rewards)
        assert hypervolume(points, reference) == pytest.approx(oracle(points, reference))

    check()


@settings(max_examples=60)
@given(clouds(3), st.randoms(use_true_random=False))
def test_order_does_not_matter(points: np.ndarray, random: object) -> None:
    order = list(range(len(points)))
    random.shuffle(order)  # type: ignore[attr-defined]
    assert hypervolume(points[order], np.zeros(3)) == pytest.approx(hypervolume(points, np.zeros(3)))
    assert (nondominated(points[order]) == nondominated(points)[order]).all()


@settings(max_examples=60)
@given(clouds(3), st.integers(0, 6), arrays(np.float64, 3, elements=st.integers(0, 3).map(float)))
def test_a_dominated_point_changes_nothing(points: np.ndarray, which: int, below: np.ndarray) -> None:
    worse = points[which % len(points)] - below
    more = np.vstack([points, worse])
    assert hypervolume(more, np.zeros(3)) == pytest.approx(hypervolume(points, np.zeros(3)))
    assert (nondominated(more)[:-1] == nondominated(points)).all()


@settings(max_examples=60)
@given(clouds(2), clouds(2))
def test_more_points_never_have_less(points: np.ndarray, others: np.ndarray) -> None:
    both = np.vstack([points, others])
    assert hypervolume(both, np.zeros(2)) >= hypervolume(points, np.zeros(2)) - 1e-9


@settings(max_examples=60)
@given(clouds(2))
def test_only_the_nondominated_points_count(points: np.ndarray) -> None:
    front = points[nondominated(points)]
    assert hypervolume(front, np.zeros(2)) == pytest.approx(hypervolume(points, np.zeros(2)))


def test_hypervolumes_takes_each_front_with_its_own_reference() -> None:
    fronts = np.array([[[2.0, 3.0]], [[2.0, 3.0]]])
    assert hypervolumes(fronts, [[0.0, 0.0], [1.0, 1.0]]).tolist() == [6.0, 2.0]


@pytest.mark.parametrize("rewards", [1, 2, 3])
def test_hypervolumes_of_many_fronts_are_those_of_each(rewards: int) -> None:
    @settings(max_examples=40)
    @given(st.integers(0, 2**32 - 1), st.integers(0, 9))
    def check(seed: int, points: int) -> None:
        rng = np.random.default_rng(seed)
        # Rounded, so that ties and copies come up.
        fronts, references = rng.normal(size=(4, 3, points, rewards)).round(1), rng.normal(size=(4, 3, rewards)) - 0.5
        expected = [[hypervolume(fronts[i, j], references[i, j]) for j in range(3)] for i in range(4)]
        assert hypervolumes(fronts, references) == pytest.approx(np.array(expected))

    check()


def test_hypervolumes_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="expected"):
        hypervolumes(np.zeros((3, 2, 2)), np.zeros((2, 2)))
    with pytest.raises(ValueError, match="finite"):
        hypervolumes(np.full((1, 2, 2), np.nan), np.zeros((1, 2)))


def test_contributions_by_hand() -> None:
    assert contributions([[1, 3], [2, 2], [3, 1]], [0, 0]) == pytest.approx([1.0, 1.0, 1.0])
    assert contributions([[3.0], [2.0]], [1.0]) == pytest.approx([1.0, 0.0])
    # [1, 1] is dominated and brings nothing, and takes nothing from [2, 2]'s rivals; copies bring nothing either.
    assert contributions([[2, 2], [1, 1], [3, 1], [3, 1]], [0, 0]) == pytest.approx([2.0, 0.0, 0.0, 0.0])
    assert contributions([[2, 2, 2]], [0, 1, 1]) == pytest.approx([2.0])
    assert contributions([[2, -1], [1, 1]], [0, 0]) == pytest.approx([0.0, 1.0])
    assert contributions(np.zeros((0, 2)), [0, 0]).shape == (0,)


def test_contributions_to_two_rewards_need_no_hypervolume_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_volume", lambda *_: pytest.fail("one for each point: time grows with the square"))
    steps = np.arange(1.0, 2001)
    assert contributions(np.stack([steps, steps[::-1]], axis=1), [0, 0]) == pytest.approx(np.ones(2000))


def test_contributions_keep_their_precision_in_a_large_hypervolume() -> None:
    tiny = [[1e6, 1.0], [1.0, 1e6], [1 + 1e-7, 1 + 1e-7]]
    assert contributions(tiny, [0, 0])[2] == pytest.approx(1e-14, rel=1e-6)


@pytest.mark.parametrize("rewards", [1, 2, 3, 4])
def test_contributions_equal_leaving_each_point_out(rewards: int) -> None:
    @settings(max_examples=40)
    @given(clouds(rewards))
    def check(points: np.ndarray) -> None:
        origin = np.zeros(rewards)
        whole = oracle(points, origin)
        left_out = [whole - oracle(np.delete(points, index, axis=0), origin) for index in range(len(points))]
        found = contributions(points, origin)
        assert found == pytest.approx(np.array(left_out))
        assert (found >= 0).all()
        assert found.sum() <= whole + 1e-9

    check()


@settings(max_examples=40)
@given(clouds(3), st.permutations(range(7)))
def test_contributions_follow_their_points(points: np.ndarray, order: list[int]) -> None:
    order = [index for index in order if index < len(points)]
    origin = np.zeros(3)
    assert contributions(points[order], origin) == pytest.approx(contributions(points, origin)[order])


def test_inputs_are_left_as_they_were() -> None:
    points, reference = np.array([[1.0, 2.0], [2.0, 1.0]]), np.array([0.5, 0.5])
    hypervolume(points, reference)
    contributions(points, reference)
    hypervolumes(points[None], reference[None])
    nondominated(points)
    assert points.tolist() == [[1.0, 2.0], [2.0, 1.0]]
    assert reference.tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    ("points", "reference"),
    [
        ([1.0, 2.0], [0.0, 0.0]),
        ([[1.0, 2.0]], [0.0]),
        ([[1.0, np.nan]], [0.0, 0.0]),
        ([[1.0, 2.0]], [0.0, np.inf]),
    ],
)
def test_wrong_arrays_are_refused(points: object, reference: object) -> None:
    with pytest.raises(ValueError, match=r"expected|reference|finite"):
        hypervolume(points, reference)  # type: ignore[arg-type]

"""Choices by hand, against a plain loop, and the properties that every rule has."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import ArrayLike

from rewarded_lines.pareto.choice import Choice, knee, weighted_rule
from rewarded_lines.pareto.hypervolume import nondominated

MEANS = [[0.0, 9.0], [1.0, 7.0], [2.0, 4.0], [3.0, 1.0]]


def best_candidate(means: ArrayLike, weights: ArrayLike, minima: dict[int, float] | None = None, **units) -> Choice:
    return weighted_rule(weights, minima, **units).choose(means)


def best_under(
    means: ArrayLike, minima: dict[int, float], maximise: int, scale: Sequence[float] | None = None
) -> Choice:
    """Maximise one reward under minima."""
    weights = np.eye(np.shape(means)[1])[maximise]
    return best_candidate(means, weights, minima, scale=scale)


def clouds(rewards: int = 2) -> st.SearchStrategy[np.ndarray]:
    numbers = st.integers(-4, 8).map(float)
    return st.integers(1, 8).flatmap(lambda count: arrays(np.float64, (count, rewards), elements=numbers))


def test_best_under_by_hand() -> None:
    assert best_under(MEANS, {1: 4.0}, 0) == Choice(2, 2.0, True, {1: 0.0})
    assert best_under(MEANS, {1: 4.1}, 0) == Choice(1, 1.0, True, {1: 0.0})
    assert best_under(MEANS, {0: 0.5, 1: 2.0}, 1).index == 1
    # A reward may be maximised and bounded.
    assert best_under(MEANS, {0: 2.5}, 0).index == 3


@pytest.mark.parametrize(("maximise", "end"), [(0, 3), (1, 0)])
def test_without_minima_the_best_of_the_reward_is_chosen(maximise: int, end: int) -> None:
    assert best_under(MEANS, {}, maximise) == Choice(end, MEANS[end][maximise], True, {})


def test_when_none_qualifies_the_nearest_is_named() -> None:
    # Largest shortfalls of the four: 2.5, 1.5, 4, 7.
    found = best_under(MEANS, {0: 2.5, 1: 8.0}, 0)
    assert found == Choice(1, 1.0, False, {0: 1.5, 1: 1.0})
    # In units of 1 and 10 they are 2.5, 1.5, .5 and .7.
    assert best_under(MEANS, {0: 2.5, 1: 8.0}, 0, scale=[1, 10]).index == 2
    # As near as each other: the objective decides.
    assert best_under([[0.0, 0.0], [0.0, 1.0]], {0: 1.0}, 1).index == 1


def test_equals_are_told_apart_by_the_other_rewards_then_by_order() -> None:
    assert best_under([[1.0, 0.0], [1.0, 2.0], [1.0, 2.0]], {}, 0).index == 1
    assert best_candidate([[0.0, 2.0], [2.0, 0.0], [1.0, 1.0]], [1, 1]).index == 1


def test_best_candidate_by_hand() -> None:
    assert best_candidate(MEANS, [1, 1]) == Choice(0, 9.0, True, {})
    found = best_candidate(MEANS, [0.5, 0.5], centre=[1, 5], scale=[0.5, 4])
    # (-2 + 1)/2, (0 + .5)/2, (2 - .25)/2, (4 - 1)/2.
    assert (found.index, found.value) == (3, 1.5)
    assert best_candidate(MEANS, [0, 2.0]).value == 18.0


def test_knee_by_hand() -> None:
    assert knee([[0, 9], [2, 8], [3, 0]]) == 1
    assert knee([[0, 1], [0.75, 0.75], [1, 0], [0.1, 0.1]]) == 1
    assert knee([[1.0], [3.0], [2.0]]) == 1
    assert knee([[2.0, 2.0], [1.0, 1.0]]) == 0
    assert knee([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0.5, 0.5, 0.5]]) == 3


def test_the_knee_of_a_straight_front_is_its_middle() -> None:
    lam = np.linspace(0, 1, 11)
    assert knee(np.stack([2.4 * lam, 8 - 8 * lam], axis=1)) == 5


@settings(max_examples=80)
@given(clouds(), st.integers(-5, 9), st.integers(-5, 9))
def test_best_under_equals_a_plain_loop(means: np.ndarray, first: int, second: int) -> None:
    minima = {0: float(first), 1: float(second)}
    found = best_under(means, minima, 1)
    qualifying = [row for row in means.tolist() if row[0] >= first and row[1] >= second]
    if qualifying:
        best = max(qualifying, key=lambda row: (row[1], row[0]))
        assert found.qualifies
        assert means[found.index].tolist() == best
    else:
        worst = [max(first - row[0], second - row[1], 0) for row in means.tolist()]
        assert not found.qualifies
        assert max(found.shortfalls.values()) == min(worst)


@settings(max_examples=80)
@given(clouds(3), st.integers(-5, 9), st.integers(0, 4))
def test_relaxing_a_minimum_never_lowers_the_optimum(means: np.ndarray, bound: int, slack: int) -> None:
    strict, relaxed = best_under(means, {0: bound}, 2), best_under(means, {0: bound - slack}, 2)
    if strict.qualifies:
        assert relaxed.qualifies
        assert relaxed.value >= strict.value
    else:
        assert relaxed.shortfalls[0] <= strict.shortfalls[0]


RULES: list[Callable[[np.ndarray], int]] = [
    lambda means: best_under(means, {0: 2.0}, 1).index,
    lambda means: best_under(means, {0: 20.0, 1: 20.0}, 1, scale=[1, 2, 3]).index,
    lambda means: best_candidate(means, [1, 2, 0], scale=[1, 2, 4]).index,
    knee,
]


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_follows_the_points_when_they_are_shuffled(rule: Callable[[np.ndarray], int]) -> None:
    @settings(max_examples=40)
    @given(clouds(3), st.permutations(range(8)))
    def check(means: np.ndarray, order: list[int]) -> None:
        shuffled = means[[index for index in order if index < len(means)]]
        assert shuffled[rule(shuffled)].tolist() == means[rule(means)].tolist()

    check()


@pytest.mark.parametrize("rule", [RULES[0], RULES[2], RULES[3]])
def test_no_rule_chooses_a_dominated_point(rule: Callable[[np.ndarray], int]) -> None:
    @settings(max_examples=60)
    @given(clouds(3))
    def check(means: np.ndarray) -> None:
        assert nondominated(means)[rule(means)]

    check()


@settings(max_examples=60)
@given(clouds(3), st.integers(1, 9), st.integers(-5, 5))
def test_the_knee_does_not_depend_on_units(means: np.ndarray, factor: int, shift: int) -> None:
    assume(len(np.unique(means, axis=0)) == len(means))
    assert knee(means * [1, factor, 1] + shift) == knee(means)


@pytest.mark.parametrize(
    "mistake",
    [
        lambda: best_under(np.zeros((0, 2)), {}, 0),
        lambda: best_under([[np.nan, 1.0]], {}, 0),
        lambda: best_under(MEANS, {2: 0.0}, 0),
        lambda: best_under(MEANS, {0: np.nan}, 0),
        lambda: best_under(MEANS, {}, 0, scale=[1, 0]),
        lambda: best_candidate(MEANS, [1]),
        lambda: best_candidate(MEANS, [1, -1]),
        lambda: best_candidate(MEANS, [0, 0]),
        lambda: best_candidate(MEANS, [1, 1], centre=[0]),
        lambda: knee([1.0, 2.0]),
    ],
)
def test_mistakes_are_refused(mistake: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=r"expected|finite|no reward"):
        mistake()

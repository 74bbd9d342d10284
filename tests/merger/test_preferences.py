"""Weights from text, and grids over the simplex."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewarded_lines.errors import UserError
from rewarded_lines.merger.preferences import folder_name, parse_weights, simplex_grid


def test_one_number_means_the_first_of_two():
    assert parse_weights("0.9", ["a", "b"]) == (0.9, 0.1)
    assert parse_weights("1", ["a"]) == (1.0,)
    assert parse_weights("0.2,0.3,0.5", ["a", "b", "c"]) == (0.2, 0.3, 0.5)


@pytest.mark.parametrize(
    ("text", "policies", "message"),
    [
        ("1.5", "ab", "outside 0 to 1"),
        ("0.2,0.3,0.5", "ab", "3 weights for 2 policies"),
        ("0.2,0.3", "ab", "do not sum to 1"),
        ("half", "ab", "not a weight"),
        ("nan", "ab", "not a weight"),
        ("0.5", "abc", "1 weights for 3 policies"),
    ],
)
def test_refused(text, policies, message):
    with pytest.raises(UserError, match=message):
        parse_weights(text, list(policies))


def test_extrapolation_is_asked_for():
    assert parse_weights("1.5", ["a", "b"], extrapolate=True) == (1.5, -0.5)


@given(st.integers(1, 4), st.integers(2, 7))
def test_simplex_grid(policies, points):
    grid = simplex_grid(policies, points)
    assert len(grid) == len(set(grid)) == math.comb(points - 1 + policies - 1, policies - 1)
    assert all(math.isclose(sum(weights), 1) and min(weights) >= 0 for weights in grid)
    assert all(tuple(float(i == corner) for i in range(policies)) in grid for corner in range(policies))


def test_two_policies_go_along_lambda():
    assert simplex_grid(2, 3) == [(0.0, 1.0), (0.5, 0.5), (1.0, 0.0)]


def test_folder_names():
    assert folder_name((0.5, 0.5)) == "lam=0.50"
    assert folder_name((0.2, 0.3, 0.5)) == "lam=0.20,0.30,0.50"
    assert folder_name((1 / 3, 2 / 3)) != folder_name((0.33, 0.67))

"""Merge rules by hand-computed values, symmetries and endpoints."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rewarded_lines.errors import UserError
from rewarded_lines.merger.merge_rules import (
    breadcrumbs,
    consensus,
    dare,
    dare_ties,
    della,
    ram,
    ram_plus,
    relative,
    sce,
    slerp_weights,
    soup,
    spread,
    ties,
)
from rewarded_lines.merger.methods import METHODS, check_method

A = np.array([1.0, -2.0, 0.5, 0.0, 3.0])
B = np.array([-3.0, -4.0, 0.25, 1.0, -3.0])
KEPT = [np.arange(5) % 2 == 0, np.arange(5) % 3 == 0]
# Of the rules that have some.
PARAMETERS = {
    "ties": {"thresholds": [1.0, 1.0], "join": "mean"},
    "dare": {"kept": KEPT, "density": 0.5},
    "dare-ties": {"kept": KEPT, "density": 0.5, "join": "mean"},
    "consensus": {"tall": 0.4, "agree": 2},
    "ram": {"changed": 0.4},
    "ram-plus": {"changed": 0.4, "boosts": [0.25, 0.375]},
    "sce": {"least": 4.0, "squares": [0.3, 0.7]},
    "della": {"kept": [mask / 0.7 for mask in KEPT], "join": "sum"},
    "breadcrumbs": {"lower": [0.5, 1.0], "upper": [2.0, 3.0], "join": "all"},
}
VALUES = hnp.arrays(np.float64, 6, elements=st.floats(-4, 4, width=16))
WEIGHT = st.floats(0, 1, width=16)


def test_soup():
    assert soup([A, B], [0.25, 0.75]).tolist() == [-2.0, -3.5, 0.3125, 0.75, -1.5]


@pytest.mark.parametrize(
    ("join", "expected"),
    # Weighted and trimmed: A 0 -1 0 0 1.5; B -1.5 -2 0 0 -1.5. Signs elected: - - 0 0 0.
    [("mean", [-3.0, -3.0, 0.0, 0.0, 0.0]), ("sum", [-1.5, -3.0, 0.0, 0.0, 0.0])],
)
def test_ties_by_hand(join, expected):
    assert ties([A, B], [0.5, 0.5], thresholds=[2.0, 2.0], join=join).tolist() == expected


def test_ties_elects_by_weight():
    assert ties([A, B], [0.9, 0.1], thresholds=[0.0, 0.0], join="mean")[0] == 1.0
    assert ties([A, B], [0.1, 0.9], thresholds=[0.0, 0.0], join="mean")[0] == -3.0
    # A negative weight, from extrapolation, reverses a policy's sign.
    assert ties([A, B], [1.5, -0.5], thresholds=[0.0, 0.0], join="sum")[0] == 3.0


def test_dare_by_hand():
    kept = [np.array([True, False, True, True, False]), np.array([False, True, True, False, True])]
    assert dare([A, B], [0.5, 0.5], kept=kept, density=0.5).tolist() == [1.0, -4.0, 0.75, 0.0, -3.0]
    joined = dare_ties([A, B], [0.5, 0.5], kept=kept, density=0.5, join="mean")
    assert joined.tolist() == [2.0, -8.0, 0.75, 0.0, -6.0]


def test_consensus_by_hand():
    # Each policy against the other: at μ = 1, A needs 0.5 and 3 (as large as B's), B all but 0.5.
    assert consensus([A, B], [1.0, 1.0], tall=1.0, agree=2).tolist() == [0.0, 0.0, 0.0, 0.0, 0.0]
    assert consensus([A, B], [1.0, 1.0], tall=1.0, agree=1).tolist() == (A + B).tolist()
    assert consensus([A, B], [1.0, 1.0], tall=0.5, agree=2).tolist() == [0.0, -6.0, 0.75, 0.0, 0.0]
    # The masks do not depend on λ.
    assert consensus([A, B], [1.0, 0.0], tall=0.5, agree=2).tolist() == [0.0, -2.0, 0.5, 0.0, 3.0]


def test_relative_weights():
    assert relative([0.25, 0.25]) == (1.0, 1.0) and relative([1.0, 0.0]) == (1.0, 0.0) and relative([0.0]) == (0.0,)
    # Extrapolation keeps the signs.
    assert relative([1.5, -0.5]) == (1.0, -1 / 3) and relative([-1.0, -2.0]) == (-0.5, -1.0)


def test_ram_by_hand():
    # Changed by more than 0.4: A 1 -2 0.5 · 3, B -3 -4 · 1 -3.
    assert ram([A, B], [1.0, 1.0], changed=0.4).tolist() == [-1.0, -3.0, 0.5, 1.0, 0.0]
    # A mean by weight where both changed; where one did, its value times its weight.
    assert ram([A, B], [0.5, 1.0], changed=0.4).tolist() == pytest.approx([-2.5 / 1.5, -5 / 1.5, 0.25, 1.0, -1.0])
    assert ram([A, B], [1.0, -0.5], changed=0.4).tolist() == pytest.approx([2.5 / 1.5, 0.0, 0.5, -0.5, 3.0])
    assert ram_plus([A, B], [1.0, 1.0], changed=0.4, boosts=[0.5, 2.0]).tolist() == [-1.0, -3.0, 0.75, 3.0, 0.0]
    special = np.array([np.nan, np.inf, 0.0, 1e-6, -2.0])
    found = ram([special, B], [1.0, 1.0], changed=0.4)
    assert np.isnan(found[0]) and found[1:].tolist() == [np.inf, 0.0, 1.0, -2.5]


def test_sce_by_hand():
    # Twice the squared differences: 32 8 0.125 2 72; the squares are unequal.
    assert spread([A, B]).tolist() == [32.0, 8.0, 0.125, 2.0, 72.0]
    found = sce([A, B], [1.0, 1.0], least=2.0, squares=[0.25, 0.75])
    # Signs elected: - - · + ·; the mean of the second has weights 1 : 3.
    assert found.tolist() == [-3.0, -3.5, 0.0, 1.0, 0.0]
    assert sce([A, B], [1.0, 0.0], least=2.0, squares=[0.25, 0.75]).tolist() == [1.0, -2.0, 0.0, 0.0, 3.0]
    assert sce([A, B], [1.0, 1.0], least=math.inf, squares=[0.0, 0.0]).tolist() == [0.0] * 5


def test_della_and_breadcrumbs_by_hand():
    kept = [np.array([2.0, 0.0, 2.0, 2.0, 0.0]), np.array([0.0, 1.5, 1.5, 0.0, 1.5])]
    expected = {"all": [1.0, -3.0, 0.6875, 0.0, -2.25], "mean": [2.0, -6.0, 0.6875, 0.0, -4.5]}
    for join, values in expected.items():
        assert della([A, B], [0.5, 0.5], kept=kept, join=join).tolist() == values
    band = {"lower": [0.5, 1.0], "upper": [2.0, 3.0]}
    assert breadcrumbs([A, B], [0.5, 0.5], **band, join="all").tolist() == [-1.0, -1.0, 0.25, 0.5, -1.5]
    assert breadcrumbs([A, B], [0.5, 0.5], **band, join="sum").tolist() == [-1.5, -1.0, 0.25, 0.5, -1.5]


def test_slerp_weights():
    right_angle = ((4.0, 0.0), (0.0, 9.0))
    assert slerp_weights((0.5, 0.5), right_angle) == pytest.approx((math.sqrt(0.5), math.sqrt(0.5)))
    assert slerp_weights((1.0, 0.0), right_angle) == (1.0, 0.0)
    assert slerp_weights((0.3, 0.7), ((4.0, 6.0), (6.0, 9.0))) == (0.3, 0.7)
    assert slerp_weights((0.3, 0.7), ((0.0, 0.0), (0.0, 9.0))) == (0.3, 0.7)


@given(st.lists(VALUES, min_size=2, max_size=2), WEIGHT)
def test_two_policies_may_change_places(residuals, weight):
    weights = (weight, 1 - weight)
    kept = [np.arange(6) % 2 == 0, np.arange(6) % 3 == 0]
    first = [np.abs(residuals[0]).max() / 2, np.abs(residuals[1]).max() / 3]
    parameters = {
        "soup": {},
        "ties": {"thresholds": first, "join": "mean"},
        "dare": {"kept": kept, "density": 0.5},
        "dare-ties": {"kept": kept, "density": 0.5, "join": "sum"},
        "consensus": {"tall": 0.4, "agree": 2},
        "ram-plus": {"changed": 0.5, "boosts": [0.25, 0.5]},
        "sce": {"least": 1.0, "squares": [0.25, 0.75]},
        "della": {"kept": [mask * 1.5 for mask in kept], "join": "mean"},
        "breadcrumbs": {"lower": [0.25, 0.5], "upper": first, "join": "mean"},
    }
    for name, given_ in parameters.items():
        turned = {key: value[::-1] if isinstance(value, list) else value for key, value in given_.items()}
        rule = METHODS[name].rule
        assert np.array_equal(rule(residuals, weights, **given_), rule(residuals[::-1], weights[::-1], **turned)), name


@given(VALUES, VALUES)
def test_alone_each_rule_gives_the_policy(first, second):
    ends = {
        "soup": {},
        "ties": {"thresholds": [0.0, 0.0], "join": "mean"},
        "dare": {"kept": [np.ones(6, bool)] * 2, "density": 1.0},
        "dare-ties": {"kept": [np.ones(6, bool)] * 2, "density": 1.0, "join": "mean"},
        "consensus": {"tall": 0.4, "agree": 0},
        "sum": {},
        "ram": {"changed": 0.0},
        "sce": {"least": 0.0, "squares": [0.5, 0.5]},
        "della": {"kept": [np.ones(6)] * 2, "join": "mean"},
        "breadcrumbs": {"lower": [0.0] * 2, "upper": [math.inf] * 2, "join": "all"},
    }
    for name, parameters in ends.items():
        assert np.array_equal(METHODS[name].rule([first, second], [1.0, 0.0], **parameters), first), name


@given(st.lists(VALUES, min_size=3, max_size=3), st.floats(0.125, 8, width=16))
def test_rules_scale_with_the_residuals(residuals, factor):
    factor = 2.0 ** round(math.log2(factor))
    for join in ("mean", "sum"):
        once = ties(residuals, [0.5, 0.25, 0.25], thresholds=[1.0] * 3, join=join)
        more = ties([r * factor for r in residuals], [0.5, 0.25, 0.25], thresholds=[factor] * 3, join=join)
        assert np.array_equal(once * factor, more)


@pytest.mark.parametrize("name", METHODS)
def test_rules_run_on_torch_as_on_numpy(name):
    import torch

    parameters = PARAMETERS.get(name, {})
    there = {k: [torch.from_numpy(m) for m in v] if k == "kept" else v for k, v in parameters.items()}
    here = METHODS[name].rule([A, B], [0.3, 0.7], **parameters)
    moved = METHODS[name].rule([torch.from_numpy(A), torch.from_numpy(B)], [0.3, 0.7], **there)
    assert moved.dtype == torch.float64 and np.array_equal(here, moved.numpy())


def test_defaults_are_filled_in_and_options_checked():
    assert check_method("ties", {"join": "sum"}, 2) == {"density": 0.2, "scope": "model", "join": "sum"}
    with pytest.raises(UserError, match="did you mean `ties`"):
        check_method("tie", {}, 2)
    with pytest.raises(UserError) as caught:
        check_method("ties", {"density": 0.0, "join": "max", "seed": 1, "scope": 3}, 2)
    said = str(caught.value)
    assert "--density: out of range" in said and "a number > 0 and ≤ 1" in said
    assert "mean or sum" in said and "--seed: not an option of ties" in said and "model or tensor" in said
    with pytest.raises(UserError, match="a whole number ≥ 0"):
        check_method("consensus", {"agree": 1.5}, 2)
    for density, window in ((0.7, 0.7), (0.2, 0.4)):
        with pytest.raises(UserError, match=rf"--method della: out of range(.|\n)*got: --density {density} --window"):
            check_method("della", {"density": density, "window": window}, 2)
    assert check_method("della", {"density": 0.7, "window": 0.6}, 2)["join"] == "mean"
    assert check_method("della", {"density": 1.0, "window": 0.7}, 2)["seed"] == 0
    for method, count in (("wise-ft", 2), ("slerp", 3)):
        with pytest.raises(UserError, match=f"the method {method} takes"):
            check_method(method, {}, count)

"""Which λ a sweep evaluates: values by hand, nested, even, and refused where there are too few."""

from __future__ import annotations

from math import comb

import numpy as np
import pytest

from rewarded_lines.config import SweepSpec
from rewarded_lines.errors import UserError
from rewarded_lines.evaluator.weight_designs import LATTICE, SPREAD, Design, spread
from rewarded_lines.merger.spec import parse_weights, simplex_grid


def test_the_order_by_hand():
    found = spread(4, 13)
    assert found[:4] == [tuple(row) for row in np.eye(4).tolist()]
    assert found[4] == (0.25,) * 4
    # Neighbours on the ring a b c d, then those two steps apart.
    middles = [(0, 1), (0, 3), (1, 2), (2, 3), (0, 2), (1, 3)]
    assert [tuple(np.flatnonzero(one)) for one in found[5:11]] == middles
    assert all(max(one) == 0.5 for one in found[5:11])
    # Sobol's second and third point are (½, ½, ½) and (¾, ¼, ¼). The first, 0, is the first policy, which is there.
    for weights, cube in zip(found[11:], ([0.5] * 3, [0.75, 0.25, 0.25]), strict=True):
        one, two, three = cube[0] ** (1 / 3), cube[1] ** (1 / 2), cube[2]
        expected = [1 - one, one * (1 - two), one * two * (1 - three), one * two * three]
        assert weights == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("policies", [3, 4, 8, 20])
def test_more_points_begin_with_the_same(policies):
    many = spread(policies, 400)
    assert spread(policies, policies + 3) == many[: policies + 3] and len(set(many)) == 400
    # `merge --lam` takes each of them.
    names = [f"p{index}" for index in range(policies)]
    assert all(parse_weights(",".join(map(str, one)), names) == one for one in many)


def test_the_inside_is_even():
    inside = np.array(spread(8, 37 + 512)[37:])
    assert inside.mean(axis=0) == pytest.approx([1 / 8] * 8, abs=0.002)
    # A uniform λ has λ_i ≤ t with probability 1 − (1 − t)^7.
    for bound in (0.05, 0.1, 0.3):
        assert (inside <= bound).mean(axis=0) == pytest.approx([1 - (1 - bound) ** 7] * 8, abs=0.04)


def test_a_truncated_set_of_middles_has_each_policy_as_often():
    middles = np.array(spread(8, 8 + 1 + 8)[9:])
    assert (middles > 0).sum(axis=0).tolist() == [2] * 8


@pytest.mark.parametrize("policies", [2, 3])
def test_few_policies_keep_their_lattice(policies):
    design = Design.of(None, policies, "")
    assert (design.kind, design.usual, design.first) == (LATTICE, 11, 3)
    assert design.weights(11) == simplex_grid(policies, 11)
    assert Design.of(LATTICE, 8, "").weights(3) == simplex_grid(8, 3)


def test_many_policies_spread_unless_told_otherwise():
    design = Design.of(None, 8, "")
    assert (design.kind, design.usual, design.first) == (SPREAD, 8 + 1 + comb(8, 2), 9)
    assert len(design.weights(50)) == 50 and Design.of(None, 4, "").usual == 11


@pytest.mark.parametrize(
    ("policies", "kind", "count", "said"),
    [(8, None, 7, "8 or more"), (2, SPREAD, 7, "three policies"), (3, SPREAD, 2, "3 or more"), (2, None, 1, "2 or")],
)
def test_what_no_design_has_is_refused(policies, kind, count, said):
    with pytest.raises(UserError, match=said):
        Design.of(kind, policies, "file: sweep.design").check(count, "file: sweep.points")


def test_a_step_is_of_a_lattice():
    spec = SweepSpec.model_validate({"step": 0.25})
    assert (spec.points, spec.design) == (5, LATTICE)
    with pytest.raises(ValueError, match="a step is of a lattice"):
        SweepSpec.model_validate({"step": 0.25, "design": SPREAD})
    with pytest.raises(ValueError, match="lattice"):
        SweepSpec.model_validate({"design": "grid"})

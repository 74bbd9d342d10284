"""The LiNeS schedule against values computed by hand."""

import pytest

from rewarded_lines.checkpoints.tensor_depth import Place
from rewarded_lines.errors import UserError
from rewarded_lines.merger.lines_schedule import Line, Schedule, lines_scale


@pytest.mark.parametrize(("block", "scale"), [(0, 1.0), (1, 1.25), (2, 1.5), (4, 2.0), (None, 1.0)])
def test_schedule_of_the_paper(block, scale):
    assert lines_scale(block, 5, alpha=1.0, beta=1.0) == scale


def test_single_block_and_reversed_schedule():
    assert lines_scale(0, 1, alpha=0.3, beta=9.0) == 0.3
    assert [lines_scale(block, 3, 2.0, -1.0) for block in range(3)] == [2.0, 1.5, 1.0]


def at(side, block=None, blocks=3):
    return Place("model.layers", block, blocks, side)


def tensor_scale(place, alpha, beta, outside="alpha", name=""):
    return Schedule((Line(alpha, beta),), outside=outside).scale(place, name)


@pytest.mark.parametrize("outside", ["alpha", "depth"])
def test_inside_the_blocks_the_rule_for_outside_changes_nothing(outside):
    assert [tensor_scale(at("in", block), 0.5, 1.0, outside) for block in range(3)] == [0.5, 1.0, 1.5]


@pytest.mark.parametrize("side", ["before", "after", "unknown"])
def test_outside_the_blocks_alpha_as_in_the_authors_code(side):
    assert tensor_scale(at(side), 0.5, 1.0) == tensor_scale(at(side), 0.5, 1.0, "alpha") == 0.5


def test_outside_the_blocks_by_depth_the_next_block_decides():
    assert tensor_scale(at("before"), 0.5, 1.0, "depth") == 0.5
    assert tensor_scale(at("after"), 0.5, 1.0, "depth") == 1.5
    assert tensor_scale(at("after", blocks=1), 0.5, 1.0, "depth") == 0.5


def test_an_unknown_side_is_refused_by_depth_and_shown_the_way_out():
    with pytest.raises(UserError, match="odd.weight: unknown whether .*(?s:.)*--outside alpha"):
        tensor_scale(at("unknown"), 1.0, 1.0, "depth", name="odd.weight")
    with pytest.raises(UserError, match="model.layers: unknown whether"):
        tensor_scale(at("unknown"), 1.0, 1.0, "depth")

"""The LiNeS schedule against values computed by hand."""

import pytest

from rewarded_lines.merging.lines import lines_scale


@pytest.mark.parametrize(("block", "scale"), [(0, 1.0), (1, 1.25), (2, 1.5), (4, 2.0), (None, 1.0)])
def test_schedule_of_the_paper(block, scale):
    assert lines_scale(block, 5, alpha=1.0, beta=1.0) == scale


def test_single_block_and_reversed_schedule():
    assert lines_scale(0, 1, alpha=0.3, beta=9.0) == 0.3
    assert [lines_scale(block, 3, 2.0, -1.0) for block in range(3)] == [2.0, 1.5, 1.0]

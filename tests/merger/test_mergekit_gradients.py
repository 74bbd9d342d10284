"""Numbers over depth, split into λ and a schedule."""

import pytest

from rewarded_lines.merger.mergekit_gradients import Line, factor, line_of, multiply, normalized, tidy


@pytest.mark.parametrize(
    ("setting", "ends"),
    [
        (0.5, (0.5, 0.5)),
        (1, (1.0, 1.0)),
        ([0.7, 1.6], (0.7, 1.6)),
        ([0.2], (0.2, 0.2)),
        ([0.1, 0.2, 0.3], (0.1, 0.3)),  # straight, though 0.2 is not halfway in binary
        ([2, 0, -2], (2.0, -2.0)),
        (["1e-3", 1], (0.001, 1.0)),  # YAML takes 1e-3 for text, mergekit for a number
    ],
)
def test_numbers_and_straight_lists_are_lines(setting, ends):
    assert line_of(setting) == Line(*ends)


@pytest.mark.parametrize("setting", [[0, 0.3, 0.7, 1], [1, 0.7, 0.1], [], "much", True, [0.5, None], float("nan"), {}])
def test_what_is_not_straight_or_no_number_is_none(setting):
    assert line_of(setting) is None


def test_the_same_gradient_for_all_is_a_schedule():
    product = factor([Line(0.28, 0.64), Line(0.42, 0.96)])
    assert product is not None
    assert product.weights == (0.4, 0.6)
    assert (product.schedule.first, product.schedule.beta) == (0.7, 0.9)


def test_a_gradient_that_begins_at_nothing_is_anchored_at_its_end():
    product = factor([Line(0.0, 0.3), Line(0.0, 0.7)])
    assert product is not None
    assert product.weights == (0.3, 0.7)
    assert product.schedule == Line(0.0, 1.0)


def test_weights_that_do_not_change_stay_as_they_are():
    product = factor([Line(1.0, 1.0), Line(-1.0, -1.0)])
    assert product is not None
    assert product.weights == (1.0, -1.0)
    assert product.schedule == Line(1.0, 1.0)


def test_weights_that_cancel_keep_their_size():
    product = factor([Line(1.0, 2.0), Line(-1.0, -2.0)])
    assert product is not None
    assert product.weights == (1.0, -1.0)
    assert product.schedule == Line(1.0, 2.0)


def test_other_ratios_at_other_depths_are_no_schedule():
    assert factor([Line(0.0, 1.0), Line(1.0, 0.0)]) is None


def test_normalizing_divides_by_the_sum_or_keeps_the_ratio():
    assert normalized([Line(1.0, 0.5), Line(0.0, 0.5)]) == [Line(1.0, 0.5), Line(0.0, 0.5)]
    assert normalized([Line(1.0, 2.0), Line(3.0, 6.0)]) == [Line(0.25, 0.25), Line(0.75, 0.75)]
    assert normalized([Line(1.0, 2.0), Line(3.0, 1.0)]) is None
    assert normalized([Line(0.0, 1.0), Line(0.0, 2.0)]) is None  # 0/0 in the first block


def test_two_gradients_multiply_to_no_line():
    assert multiply(Line(1.0, 2.0), Line(3.0, 3.0)) == Line(3.0, 6.0)
    assert multiply(Line(1.0, 2.0), Line(3.0, 4.0)) is None


def test_noise_of_the_last_digit_goes_and_what_is_meant_stays():
    assert tidy(0.1 * 7) == 0.7
    assert tidy(1 / 3) == 1 / 3
    assert Line(0.7, 1.6).beta == 0.9

"""Means and gains by hand, with and without missing scores."""

import math
import statistics

import pytest

from rewarded_lines.errors import UserError
from rewarded_lines.training.gains import check_scored, describe, paired_gain, scored, summary

NAN = math.nan


def test_a_gain_is_the_mean_difference_over_the_same_prompts():
    before, after = [1.0, 2.0, 6.0], [2.0, 5.0, 5.0]
    found = paired_gain(before, after)
    # Differences 1, 3 and −1: mean 1, standard deviation 2.
    half = 1.96 * 2 / math.sqrt(3)
    assert (found["before"], found["after"], found["gain"]) == (3.0, 4.0, 1.0)
    assert found["gain_interval"] == pytest.approx([1 - half, 1 + half])
    assert paired_gain(after, after) == {"before": 4.0, "after": 4.0, "gain": 0.0, "gain_interval": [0.0, 0.0]}
    with pytest.raises(ValueError, match="shorter"):
        paired_gain(before, after[:2])


def test_one_prompt_has_no_interval():
    found = paired_gain([1.0], [3.0])
    assert found["gain"] == 2.0 and all(map(math.isnan, found["gain_interval"]))
    assert summary([2.0]) == "2.00 (s.e. nan)"


def test_gains_and_scores_as_text():
    assert summary([1.0, 3.0]) == f"2.00 (s.e. {statistics.stdev([1, 3]) / 2**0.5:.2f})" == "2.00 (s.e. 1.00)"
    found = {"brief": paired_gain([1.0, 2.0, 6.0], [2.0, 5.0, 5.0]), "kind": paired_gain([0.0, 0.0], [-1.0, -1.0])}
    assert describe(found) == (
        "`brief` on validation prompts: 3 -> 4, gain +1 [-1.26, 3.26]\n"
        "`kind` on validation prompts: 0 -> -1, gain -1 [-1, -1]"
    )


def test_missing_scores_are_out_of_means_and_of_the_gain():
    before, after = [1.0, NAN, 2.0, 6.0, 4.0], [2.0, 3.0, NAN, 5.0, 7.0]
    found = paired_gain(before, after)
    assert found["before"] == (1 + 2 + 6 + 4) / 4 and found["after"] == (2 + 3 + 5 + 7) / 4
    # The first, the fourth and the last prompt have both: 1, −1 and 3, of mean 1 and standard deviation 2.
    half = 1.96 * 2 / math.sqrt(3)
    assert found["gain"] == 1.0 and found["gain_interval"] == pytest.approx([1 - half, 1 + half])
    assert found["abstained"] == {"before": 1, "after": 1}
    assert describe({"x": found}).endswith("; no score for 1 responses before, 1 after")
    assert summary(before) == "3.25 (s.e. 1.11; 1 of 5 have no score)"
    assert scored(before) == [1.0, 2.0, 6.0, 4.0] and "abstained" not in paired_gain([1.0, 2.0], [1.0, 2.0])


def test_too_few_scores_are_refused_by_name():
    with pytest.raises(UserError, match="reward `x`: the reward abstains") as caught:
        paired_gain([1.0, NAN, 2.0], [NAN, 1.0, 3.0], "x")
    assert caught.value.problems[0].got == "1" and "3 prompts" in caught.value.problems[0].expected
    check_scored({"x": [1.0], "y": [1.0, 2.0, NAN]})
    with pytest.raises(UserError, match="reward `y`") as caught:
        check_scored({"x": [1.0, 2.0], "y": [NAN, 2.0, NAN]})
    assert "validation_limit" in caught.value.problems[0].remedy

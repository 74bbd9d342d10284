"""Rewards as TRL's trainers call them: each for itself, scored once, summing to what a policy is trained for."""

import math

import pytest
from tiny_models import make_tokenizer

from rewarded_lines.engines.responses import ResponseReader
from rewarded_lines.rewards.reward import Reward
from rewarded_lines.training.training_reward import PENALTY, RewardFunctions, WeightedReward

RESPONSES = [" a warm film", " dull", " it goes on", " quiet"]
ROWS = [{"prompt": "A Film"}, {"prompt": "The Town"}]
NUMBERS = [0, 0, 1, 1]


class Recorder(Reward):
    """A reward by the response, None for some; it records the pairs."""

    def __init__(self, name, scores):
        self.name, self.fingerprint, self.seen = name, name, []
        self._scores = scores

    def score(self, prompts, responses, columns=None):
        self.seen.append(list(zip(prompts, responses, strict=True)))
        return [self._scores.get(response, math.nan) for response in responses]


@pytest.fixture
def parts():
    """Two rewards of which neither scores the last response, their sum, a reader, and tokens: two have no end."""
    tokenizer = make_tokenizer()
    first = Recorder("first", {RESPONSES[0]: 3.0, RESPONSES[1]: 1.0, RESPONSES[2]: 4.0})
    second = Recorder("second", {RESPONSES[0]: 0.2, RESPONSES[2]: 0.6})
    reward = WeightedReward({"first": first, "second": second}, {"first": 0.25, "second": -2.0})
    reward.scales = {"first": (2.0, 0.5), "second": (0.4, 0.1)}
    reader = ResponseReader(tokenizer, frozenset([tokenizer.eos_token_id]))
    ids = tokenizer(RESPONSES, add_special_tokens=False)["input_ids"]
    ended = [ids[0] + [tokenizer.eos_token_id], ids[1], ids[2] + [tokenizer.eos_token_id], ids[3]]
    return first, second, reward, reader, ended


@pytest.mark.parametrize("penalty", [None, 0.0, 1.5])
def test_the_weighted_functions_sum_to_the_reward_less_the_penalty_applied_once(parts, penalty):
    first, second, reward, reader, ids = parts
    rewarded = RewardFunctions(reward, reader, ROWS, penalty)
    names = ["first", "second", *([PENALTY] if penalty else [])]
    assert [function.__name__ for function in rewarded.functions] == names
    columns = [one(row=NUMBERS, completion_ids=ids, trainer_state=None) for one in rewarded.functions]
    assert columns[:2] == [
        pytest.approx([2.0, -2.0, 4.0, math.nan], nan_ok=True),
        pytest.approx([-2.0, math.nan, 2.0, math.nan], nan_ok=True),
    ]
    assert rewarded.weights == [0.25, -2.0, *([1.5] if penalty else [])]
    # No score, no penalty: TRL takes a row with any number for a scored one.
    assert columns[2:] == ([pytest.approx([0.0, -1.0, 0.0, math.nan], nan_ok=True)] if penalty else [])
    sums = [
        sum(weight * score for weight, score in zip(rewarded.weights, row, strict=True) if not math.isnan(score))
        for row in zip(*columns, strict=True)
    ]
    assert sums[:3] == pytest.approx([0.5 + 4.0, -0.5 - (penalty or 0.0), 1.0 - 4.0])
    texts = [ROWS[number]["prompt"] for number in NUMBERS]
    totals = reward.score(texts, RESPONSES)
    assert totals[0] == pytest.approx(sums[0]) and math.isnan(totals[3])
    # Once for all functions, by the prompts as they are, whatever the policy's tokenizer makes of them.
    assert first.seen[:-1] == second.seen[:-1] == [list(zip(texts, RESPONSES, strict=True))]


def test_another_batch_is_scored_anew(parts):
    first, _, reward, reader, ids = parts
    rewarded = RewardFunctions(reward, reader, ROWS)
    for batch in (ids[:2], ids[2:], ids[:2]):
        for function in rewarded.functions:
            function([0, 1], batch)
    assert [[response for _, response in seen] for seen in first.seen] == [RESPONSES[:2], RESPONSES[2:], RESPONSES[:2]]

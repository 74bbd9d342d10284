"""Weighted rewards computed by hand, standardized on the SFT model's scores, and as RLOO calls them."""

import math
import statistics

import pytest
from tiny_models import make_tokenizer

from rewarded_lines.engines.responses import ResponseReader
from rewarded_lines.errors import UserError
from rewarded_lines.projects import load_project
from rewarded_lines.rewards.reward import Reward
from rewarded_lines.training.scratch_model import ScratchModel, train_tokenizer
from rewarded_lines.training.training_reward import (
    RewardFunctions,
    WeightedReward,
    load_training_reward,
    tell_all_equal,
)

NAN = math.nan
PROMPTS = ["A Film", "the quiet End of it all, says", "IT"]
RESPONSES = [" that moves.", " he, and goes on and on", ""]
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]

ROWS = [{"prompt": prompt} for prompt in PROMPTS]


class Scores(Reward):
    """A reward from a function of one pair; it records the pairs."""

    def __init__(self, name, score):
        self.name, self.fingerprint = name, f"<{name}>"
        self.seen = []
        self._score = score

    def score(self, prompts, responses, columns=None):
        self.seen += zip(prompts, responses, strict=True)
        return [float(self._score(prompt, response)) for prompt, response in zip(prompts, responses, strict=True)]


def length():
    return Scores("length", lambda prompt, response: len(response))


def capitals():
    return Scores("capitals", lambda prompt, response: sum(map(str.isupper, prompt)) - len(response) / 100)


def both(weights=None):
    return WeightedReward({"length": length(), "capitals": capitals()}, weights or {"length": 0.5, "capitals": -2.0})


def test_a_sum_is_the_weights_times_the_scores():
    reward = both()
    assert reward.parts(PROMPTS, RESPONSES) == {"length": [12.0, 23.0, 0.0], "capitals": [2 - 0.12, 1 - 0.23, 2.0]}
    assert reward.score(PROMPTS, RESPONSES) == pytest.approx([6 - 3.76, 11.5 - 1.54, -4.0])
    assert reward.score([], []) == []


def test_one_reward_of_weight_one_is_the_reward_itself():
    reward = both({"length": 1.0})
    assert reward.score(PROMPTS, RESPONSES) == [12.0, 23.0, 0.0]
    assert (reward.name, reward.fingerprint) == ("length", "1.0*<length>")
    assert list(reward.rewards) == ["length"]


def test_a_sum_has_a_name_of_its_own_and_a_fingerprint_that_tells_weights_apart():
    reward = both()
    assert reward.name == "length+capitals"
    prints = {
        one.fingerprint for one in (reward, both({"length": 1.0}), both({"length": 0.5}), both({"capitals": 1.0}))
    }
    assert reward.fingerprint == "0.5*<length>+-2.0*<capitals>" and len(prints) == 4


def test_standardized_rewards_count_in_deviations_of_the_sft_models_scores():
    reward = both()
    reward.standardize({"length": [1.0, 3.0], "capitals": [0.0, 0.0, 4.0, 4.0]})
    assert reward.scales == {"length": (2.0, 1.0), "capitals": (2.0, 2.0)}
    # 0.5·(12 − 2)/1 − 2·(1.88 − 2)/2 for the first pair, and so on.
    expected = [5.0 + 0.12, 10.5 + 1.23, -1.0 - 0.0]
    assert reward.score(PROMPTS, RESPONSES) == pytest.approx(expected)
    assert reward.total({"length": [2.0], "capitals": [2.0]}) == [0.0]
    assert reward.parts(PROMPTS, RESPONSES)["length"] == [12.0, 23.0, 0.0]


def test_on_its_own_sample_a_standardized_reward_has_mean_zero_and_deviation_one():
    reward = both({"length": 1.0})
    reward.standardize(reward.parts(PROMPTS, RESPONSES))
    scores = reward.score(PROMPTS, RESPONSES)
    assert statistics.fmean(scores) == pytest.approx(0, abs=1e-12) and statistics.pstdev(scores) == pytest.approx(1)


def test_a_reward_that_abstains_adds_nothing_to_a_sum():
    reward = both()
    reward.standardize({"length": [1.0, NAN, 3.0], "capitals": [0.0, 0.0, 4.0, NAN, 4.0]})
    assert reward.scales == {"length": (2.0, 1.0), "capitals": (2.0, 2.0)}
    total = reward.total({"length": [12.0, NAN, 5.0, NAN], "capitals": [1.88, 0.5, NAN, NAN]})
    # 0.5·(r − 2)/1 − 2·(r − 2)/2 over what is there.
    assert total[:3] == pytest.approx([5.0 + 0.12, 1.5, 1.5]) and math.isnan(total[3])


def test_rewards_that_score_all_alike_are_told():
    told = tell_all_equal({"length": [1.0, NAN, 1.0], "capitals": [1.0, 2.0]})
    assert len(told) == 1 and told[0].startswith(
        "reward `length`: every response of the SFT model gets the same score, 1;"
    )


@pytest.mark.parametrize("scores", [[2.0, 2.0, 2.0], [0.5], [2.0, NAN, 2.0]])
def test_a_reward_that_never_differs_is_refused_by_name(scores):
    with pytest.raises(UserError, match="reward `capitals`.*the same score") as caught:
        both().standardize({"length": [1.0, 2.0], "capitals": scores})
    assert caught.value.problems[0].got == str(scores[0])
    assert "`normalize_rewards: false`" in caught.value.problems[0].remedy


def test_chats_reach_a_reward_whole():
    reward = both({"length": 1.0})
    assert reward.score([CHAT, "Why?"], ["So.", "So."]) == [3.0, 3.0]
    assert reward.rewards["length"].seen == [(CHAT, "So."), ("Why?", "So.")]


class Short(Scores):
    """A reward model that reads ten words."""

    limit = 10

    def lengths(self, prompts, responses, columns=None):
        return [len(f"{one} {two}".split()) for one, two in zip(prompts, responses, strict=True)]


def test_a_prompt_is_shortened_for_a_response_that_is_longer_than_estimated():
    reward = WeightedReward({"short": Short("short", lambda *pair: len(pair[1]))}, {"short": 1.0})
    long = "a b c d e f g h i"
    assert reward.score([long, "a", long], ["x y z", "x y z", "x"]) == [5.0, 5.0, 1.0]
    assert reward.rewards["short"].seen == [("c d e f g h i", "x y z"), ("a", "x y z"), (long, "x")]
    assert reward.shortened == {"short": 1} and reward.unread == {"short": 0}


def test_a_response_that_cannot_be_read_gets_the_lowest_score_so_far():
    reward = WeightedReward({"short": Short("short", lambda *pair: len(pair[1]))}, {"short": 1.0})
    endless = " ".join(["x"] * 11)
    with pytest.raises(UserError, match="no response is short enough"):
        reward.score(["a"], [endless])
    assert reward.score(["a", "a", "a"], ["xx", endless, "xxx"]) == [2.0, 2.0, 3.0]
    assert reward.score(["a", "a"], [endless, "xxx"]) == [2.0, 3.0] and reward.unread == {"short": 3}


def test_the_lowest_score_so_far_is_one_that_is_there():
    reward = WeightedReward(
        {"short": Short("short", lambda prompt, response: NAN if response == "x" else 7)}, {"short": 1}
    )
    endless = " ".join(["x"] * 11)
    assert reward.score(["a"] * 3, ["x", "xx", endless])[1:] == [7.0, 7.0]
    assert reward.score(["a"] * 2, [endless, "x"])[0] == 7.0


def test_the_projects_rewards_are_found_by_name(tiny):
    reward = load_training_reward(load_project(), {"letters": 0.25, "words": 1.0}, "cpu")
    words, letters = [2.0, 6.0, 0.0], [9 / 13, 16 / 24, 0.0]
    assert reward.score(PROMPTS, RESPONSES) == pytest.approx([a + b / 4 for a, b in zip(words, letters, strict=True)])
    with pytest.raises(UserError, match="no reward `word`.*\n.*\n.*did you mean `words`") as caught:
        load_training_reward(load_project(), {"word": 1.0, "leters": 1.0}, "cpu")
    assert len(caught.value.problems) == 2


def test_audit_rewards_are_not_trained_on(tiny):
    text = (tiny / "rewarded-lines.yaml").read_text()
    (tiny / "rewarded-lines.yaml").write_text(text.replace("    unit: words\n", "    role: audit\n"))
    project = load_project()
    with pytest.raises(UserError, match=r"(?s)rewards\.words: an audit reward cannot be trained on.*cannot judge it"):
        load_training_reward(project, {"letters": 1.0, "words": 1.0}, "cpu")
    assert load_training_reward(project, {"letters": 1.0}, "cpu").score(["p"], ["a"]) == [0.5]


def reader(tokenizer):
    return ResponseReader(tokenizer, frozenset([tokenizer.eos_token_id]))


def completions(tokenizer, ended=(True, False, True)):
    ids = tokenizer(RESPONSES, add_special_tokens=False)["input_ids"]
    return [row + [tokenizer.eos_token_id] * end for row, end in zip(ids, ended, strict=True)]


@pytest.mark.parametrize("lowercase", [True, False])
def test_a_trainer_scores_what_the_evaluator_scores(lowercase):
    tokenizer = train_tokenizer(PROMPTS + RESPONSES, ScratchModel(vocab_size=300, lowercase=lowercase))
    reward = WeightedReward({"capitals": capitals()}, {"capitals": 1.0})
    (function,) = RewardFunctions(reward, reader(tokenizer), ROWS).functions
    given = {"prompts": PROMPTS, "completions": ["x"] * 3, "trainer_state": None}
    scores = function(row=[0, 1, 2], completion_ids=completions(tokenizer), **given)
    # The original prompts, even if the tokenizer lower-cases them for the policy.
    assert reward.rewards["capitals"].seen == list(zip(PROMPTS, RESPONSES, strict=True))
    assert scores == capitals().score(PROMPTS, RESPONSES)


def test_a_trainer_scores_chats_and_their_answers():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for turn in messages %}<s>{{ turn.content }}</s>{% endfor %}"
    reward = both({"length": 1.0})
    (function,) = RewardFunctions(reward, reader(tokenizer), [{"prompt": CHAT}]).functions
    scores = function([0] * 3, completions(tokenizer))
    assert reward.rewards["length"].seen == [(CHAT, response) for response in RESPONSES]
    assert scores == [12.0, 23.0, 0.0]

"""Any reward as the module PPO wants: what TRL computes through it is what the reward says of the texts."""

import pytest
import torch
from rewarded_lines.evaluation.prompts import split_text
from trl.experimental.utils import get_reward

from rewarded_lines.errors import UserError
from rewarded_lines.training.reward_module import RewardModule, StandardizedReward, pad_prompts
from rewarded_lines.training.scratch import ScratchModel, train_tokenizer

PROMPTS = ["a film", "the quiet end of it all, says", "it"]
RESPONSES = [" that moves.", " he, and goes on and on", ""]


class Recorder:
    """A reward that keeps what it was given and tells pairs apart."""

    name = "recorder"
    unit = "characters"

    def __init__(self):
        self.seen = []

    def score(self, prompts, responses):
        self.seen += zip(prompts, responses, strict=True)
        return [100.0 * len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(PROMPTS + RESPONSES, ScratchModel(vocab_size=300))


def query_responses(tokenizer, ended):
    """What PPOTrainer hands over: prompts padded left, responses padded right after their EOS."""
    queries, length = pad_prompts(PROMPTS, tokenizer, 64)
    answers = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in RESPONSES]
    answers = [ids + [tokenizer.eos_token_id] * ended for ids in answers]
    width = max(map(len, answers))
    rows = [
        query + answer + [tokenizer.pad_token_id] * (width - len(answer))
        for query, answer in zip(queries, answers, strict=True)
    ]
    return torch.tensor(rows), length


@pytest.mark.parametrize("ended", [True, False])
def test_scores_through_trl_are_the_rewards_own(tokenizer, ended):
    reward = Recorder()
    rows, length = query_responses(tokenizer, ended)
    module = RewardModule(reward, tokenizer, length)
    logits, scores, _ = get_reward(module, rows, tokenizer.pad_token_id, length)
    assert reward.seen == list(zip(PROMPTS, RESPONSES, strict=True))
    assert scores.tolist() == Recorder().score(PROMPTS, RESPONSES)
    assert logits.shape == (*rows.shape, 1)


def test_prompts_are_padded_left_to_one_length_and_long_ones_left_out(tokenizer):
    rows, length = pad_prompts(PROMPTS, tokenizer, 64)
    assert {len(row) for row in rows} == {length}
    assert [tokenizer.decode(row, skip_special_tokens=True) for row in rows] == PROMPTS
    assert rows[0][0] == tokenizer.pad_token_id and rows[0][-1] != tokenizer.pad_token_id
    shorter, _ = pad_prompts(PROMPTS, tokenizer, length - 1)
    assert len(shorter) == 2


def test_a_character_across_the_border_does_not_break_the_split(tokenizer):
    ids = tokenizer("a é", add_special_tokens=False)["input_ids"]
    assert split_text(ids, len(ids) - 1, tokenizer)[0].startswith("a ")
    assert len(split_text(ids, len(ids) - 1, tokenizer)) == 2


def test_a_standardized_reward_has_mean_zero_and_spread_one_on_its_own_sample():
    reward = Recorder()
    standardized = StandardizedReward(reward, reward.score(PROMPTS, RESPONSES))
    scores = torch.tensor(standardized.score(PROMPTS, RESPONSES))
    assert scores.mean().item() == pytest.approx(0, abs=1e-6)
    assert scores.std(correction=0).item() == pytest.approx(1)


def test_a_reward_that_never_differs_is_refused():
    with pytest.raises(UserError, match="the same score"):
        StandardizedReward(Recorder(), [2.0, 2.0])

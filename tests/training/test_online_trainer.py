"""RLOO's advantages against a direct calculation, with rewards that abstain."""

import json
import logging
import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from tiny_models import make_model, make_tokenizer
from trl import RLOOConfig

from rewarded_lines.engines.responses import ResponseReader
from rewarded_lines.training.online_trainer import ReadRLOOTrainer
from rewarded_lines.training.training_record import MetricsCallback
from rewarded_lines.training.training_reward import RewardFunction, WeightedReward

NAN = math.nan
# Three groups of four: one with a response that no reward scores, one with a single score, one without any.
FIRST = [1.0, NAN, 4.0, NAN, NAN, 5.0, NAN, NAN, NAN, NAN, NAN, NAN]
SECOND = [2.0, NAN, NAN, 6.0, NAN, NAN, NAN, NAN, NAN, NAN, NAN, NAN]
WEIGHTS = {"first": 1.0, "second": 0.5}


class Given:
    """A reward with these scores, whatever the responses."""

    limit, fingerprint = None, ""

    def __init__(self, scores):
        self.scores = scores

    def score(self, prompts, *others):
        return self.scores[: len(prompts)]


def advantages(scores, groups, normalized):
    """Return A_k = r_k − mean of the others that have a score, by loops; 0 without a score or without others."""
    found = np.full(len(scores), NAN)
    for start in range(0, len(scores), groups):
        there = [at for at in range(start, start + groups) if not math.isnan(scores[at])]
        for at in there if len(there) > 1 else []:
            found[at] = scores[at] - sum(scores[other] for other in there if other != at) / (len(there) - 1)
    if normalized:
        there = found[~np.isnan(found)]
        found = (found - there.mean()) / (there.std(ddof=1) + 1e-4)
    return np.nan_to_num(found)


@pytest.mark.parametrize("normalized", [True, False])
def test_a_response_without_a_score_is_left_out_of_the_update(tmp_path, caplog, normalized):
    tokenizer = make_tokenizer()
    reader = ResponseReader(tokenizer, frozenset([tokenizer.eos_token_id]))
    reward = WeightedReward({"first": Given(FIRST), "second": Given(SECOND)}, WEIGHTS)
    settings = RLOOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=12,
        num_generations=4,
        max_completion_length=4,
        max_steps=1,
        logging_steps=1,
        beta=0.0,
        normalize_advantages=normalized,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    prompts = ["the quick", "a film", "dog"]
    trainer = ReadRLOOTrainer(
        model=make_model(0),
        args=settings,
        reader=reader,
        chats=False,
        reward_funcs=RewardFunction(reward, reader, [{"prompt": prompt} for prompt in prompts]),
        train_dataset=Dataset.from_dict({"prompt": prompts, "row": range(3)}),
        processing_class=tokenizer,
        callbacks=[MetricsCallback(tmp_path)],
    )
    made, own = [], trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda inputs: made.append(own(inputs)) or made[-1]
    with caplog.at_level(logging.WARNING):
        trainer.train()
    # 1 + 0.5·2, none, 4, 0.5·6: a part that abstains adds nothing.
    totals = [2.0, NAN, 4.0, 3.0, NAN, 5.0, *[NAN] * 6]
    by_hand = advantages(totals, 4, normalized)
    if not normalized:
        assert by_hand.tolist() == [2 - 3.5, 0.0, 4 - 2.5, 3 - 3.0, *[0.0] * 8]
    assert torch.cat([one["advantages"] for one in made]).tolist() == pytest.approx(by_hand.tolist(), abs=1e-6)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    (logged,) = [line for line in lines if "reward" in line]
    assert logged["reward"] == pytest.approx((2 + 4 + 3 + 5) / 4) and logged["unscored"] == 8
    assert (trainer.unscored, trainer.responses) == (8, 12)
    assert "returned None" not in caplog.text

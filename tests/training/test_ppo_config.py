"""PPO's settings: what they mean to GRPOTrainer, and what is refused."""

import pytest
from naive_ppo import CLIP, TEMPERATURE, settings_for

from rewarded_lines.errors import UserError


def test_settings_of_an_update(tmp_path):
    config = settings_for(tmp_path, per_device_train_batch_size=12, gradient_accumulation_steps=1, num_mini_batches=3,
                          total_episodes=30, save_steps=2, logging_steps=0.5, warmup_steps=1)  # fmt: skip
    made = config.settings(prompts=100)
    # Three updates of 12 episodes, twice in three mini-batches of 4.
    assert (made.max_steps, made.per_device_train_batch_size, made.gradient_accumulation_steps) == (18, 4, 1)
    assert (made.steps_per_generation, made.num_iterations, made.num_generations) == (3, 2, 1)
    assert (made.save_steps, made.logging_steps, made.warmup_steps) == (12, 12, 6)
    assert (made.max_completion_length, made.epsilon, made.temperature) == (6, CLIP, TEMPERATURE)
    # What was given stays as it was: records of runs hold it.
    assert (config.per_device_train_batch_size, config.save_steps) == (12, 2)
    assert settings_for(tmp_path, total_episodes=None, num_train_epochs=2).settings(80).max_steps == 20 * 4
    with pytest.raises(UserError, match="needs more prompts(.|\n)*expected: 12 or more(.|\n)*got: 11"):
        config.settings(prompts=11)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("sft_model_path", "x", "name the SFT model as `base`"),
        ("reward_model_path", "x", "name it as `reward`"),
        ("batch_size", 64, "it follows from the batch"),
        ("num_total_batches", 3, "set `total_episodes`"),
        ("beta", 0.1, "set `kl_coef` instead"),
        ("max_completion_length", 9, "set `response_length` instead"),
        ("max_steps", 9, "set `total_episodes` instead"),
        ("loss_type", "grpo", "the loss is PPO's"),
        ("num_sample_generations", 10, "`log_completions: true`"),
        ("num_mini_batches", 3, "expected: a divisor of 8"),
        ("response_length", 0, "not a positive number"),
    ],
)
def test_a_key_without_meaning_is_refused(tmp_path, key, value, words):
    with pytest.raises(UserError, match=f"^{key}: ") as raised:
        settings_for(tmp_path, **{key: value})
    assert words in str(raised.value)


def test_two_faults_are_told_at_once(tmp_path):
    with pytest.raises(UserError) as raised:
        settings_for(tmp_path, critic="shared", critic_model="rewards/positive", epsilon=0.3)
    assert [problem.where for problem in raised.value.problems] == ["epsilon", "critic_model"]

"""PPO's settings: what they mean to GRPOTrainer, and what is refused."""

from types import SimpleNamespace

import pytest
from naive_ppo import CLIP, TEMPERATURE, settings_for

from rewarded_lines.errors import UserError
from rewarded_lines.training.arguments import parse_recipe
from rewarded_lines.training.online_trainer import check_prompts
from rewarded_lines.training.ppo_config import PPOConfig


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
        check_prompts(config.settings(prompts=11), prompts=11)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("beta", 0.1, "set `kl_coef` instead"),
        ("max_completion_length", 9, "set `response_length` instead"),
        ("max_steps", 9, "set `total_episodes` instead"),
        ("loss_type", "grpo", "the loss is PPO's"),
        ("num_sample_generations", 10, "`log_completions: true`"),
        ("num_mini_batches", 3, "expected: a divisor of 8"),
        ("response_length", 0, "not a positive number"),
        ("total_episodes", 0, "not a positive number"),
        ("critic", "joint", "expected: one of separate, shared"),
        ("kl_estimator", "k2", "expected: one of k1, k3"),
        ("use_bias_correction_kl", False, "the loss is PPO's"),
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


def test_no_episode_and_a_single_one_are_refused(tmp_path):
    with pytest.raises(UserError, match="no episode to train on"):
        settings_for(tmp_path, total_episodes=None, num_train_epochs=0).settings(80)
    single = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "num_mini_batches": 1}
    with pytest.raises(UserError, match="an update of one episode(.|\n)*effective_batch_size"):
        settings_for(tmp_path, **single)


@pytest.mark.parametrize(
    ("stage", "more", "said"),
    [
        (3, {}, "^critic: ZeRO-3(.|\n)*`critic: shared`"),
        (2, {"fp16": True}, "^fp16: DeepSpeed(.|\n)*`bf16: true`"),
        (2, {}, None),
        (3, {"critic": "shared"}, None),
    ],
)
def test_what_the_critic_cannot_do_under_deepspeed_is_refused(tmp_path, stage, more, said):
    config = settings_for(tmp_path)
    vars(config).update(more, deepspeed_plugin=SimpleNamespace(zero_stage=stage))
    if said is None:
        config.settings(80)
        return
    with pytest.raises(UserError, match=said):
        config.settings(80)


def test_help_has_no_key_that_is_refused(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["recipes/ppo.py", "--help"])
    with pytest.raises(SystemExit):
        parse_recipe((PPOConfig,), ["--help"])
    shown = capsys.readouterr().out
    assert not [name for name in PPOConfig.REFUSED if f"--{name} " in shown]
    assert {"beta", "max_completion_length"} <= PPOConfig.REFUSED
    assert "--response_length " in shown and "--max_steps " in shown

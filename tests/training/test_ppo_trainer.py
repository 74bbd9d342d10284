"""PPO: resumed runs equal uninterrupted ones, adapters are their own reference, the KL reaches its target."""

import copy
import json
import shutil

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tiny_models import PROMPTS, make_model, make_tokenizer
from transformers import LlamaConfig, LlamaForSequenceClassification, TrainerControl, TrainerState, set_seed

from rewarded_lines.engines.responses import ResponseReader
from rewarded_lines.training.ppo_trainer import AdapterOff, AdaptiveKL, PPOConfig, ResumablePPOTrainer
from rewarded_lines.training.reward_module import RewardModule
from rewarded_lines.training.training_record import MetricsCallback, last_checkpoint


class Vowels:
    """A reward that differs between responses."""

    rewards: dict = {}

    def score(self, prompts, responses, columns=None):
        return [sum(letter in "aeiou" for letter in response) / (1 + len(response)) for response in responses]


def trainer(folder, lora=False, target=None, **settings):
    folder.mkdir(exist_ok=True)
    arguments = PPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        num_mini_batches=2,
        num_ppo_epochs=2,
        total_episodes=40,
        response_length=6,
        learning_rate=1e-3,
        num_sample_generations=0,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        **settings,
    )
    set_seed(0)
    tokenizer = make_tokenizer()
    reader = ResponseReader(tokenizer, frozenset([tokenizer.eos_token_id]))
    module = RewardModule(Vowels(), reader, [{"prompt": prompt} for prompt in PROMPTS * 3])
    policy = make_model(0, blocks=2)
    critic = LlamaForSequenceClassification(LlamaConfig(**{**policy.config.to_dict(), "num_labels": 1}))
    if lora:
        policy = get_peft_model(policy, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    dataset = Dataset.from_dict({"input_ids": module.padded(tokenizer.pad_token_id)})
    adaptive = [AdaptiveKL(target, 100)] if target else []
    return ResumablePPOTrainer(
        args=arguments,
        reader=reader,
        processing_class=tokenizer,
        model=policy,
        ref_model=None if lora else copy.deepcopy(policy),
        reward_model=module,
        value_model=critic,
        train_dataset=dataset,
        eval_dataset=dataset.select(range(1)),
        callbacks=[*adaptive, MetricsCallback(folder)],
    )


def trained(one):
    return {name: weight.clone() for name, weight in one.policy_model.state_dict().items()} | {
        f"critic.{name}": weight.clone() for name, weight in one.value_model.state_dict().items()
    }


def metrics(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("seconds", "eps")} for line in lines]


# 15 prompts in batches of 8 make one batch an epoch, so the checkpoint is two epochs after the start.
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_resumed_run_has_the_numbers_of_an_uninterrupted_one(tmp_path, lora):
    whole = trainer(tmp_path / "whole", lora, target=0.01, save_strategy="steps", save_steps=2)
    whole.train()
    # The state after a kill at the third of five updates.
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed" / "checkpoint-4")
    shutil.rmtree(tmp_path / "killed" / "checkpoint-5", ignore_errors=True)

    resumed = trainer(tmp_path / "killed", lora, target=0.01, save_strategy="no")
    checkpoint = last_checkpoint(tmp_path / "killed")
    assert checkpoint == str(tmp_path / "killed" / "checkpoint-2")
    resumed.train(resume_from_checkpoint=checkpoint)
    first, second = trained(whole), trained(resumed)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    expected, found = metrics(tmp_path / "whole"), metrics(tmp_path / "killed")
    # The resumed run adds a line for its beginning.
    assert [line for line in found if len(line) > 2] == [line for line in expected if len(line) > 2]
    assert [line["step"] for line in found if len(line) > 2] == [1, 2, 3, 4, 5]
    assert found[1]["objective/kl_coef"] != found[-1]["objective/kl_coef"]


def test_an_adapter_switched_off_is_the_base(tmp_path):
    policy = get_peft_model(
        make_model(0, blocks=2), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    )
    ids = torch.tensor([[5, 6, 7]])
    reference = AdapterOff(policy)
    with torch.no_grad():
        expected = make_model(0, blocks=2)(input_ids=ids).logits
        assert torch.equal(reference(input_ids=ids).logits, expected)
        assert not torch.allclose(policy(input_ids=ids).logits, expected)
    assert list(reference.parameters()) == []


def test_gradient_checkpointing_is_switched_on_and_survives_the_rollouts(tmp_path):
    one = trainer(tmp_path, lora=True)
    assert not one.policy_model.is_gradient_checkpointing
    one.args.gradient_checkpointing = True
    again = ResumablePPOTrainer(
        args=one.args,
        reader=ResponseReader(one.processing_class, frozenset([one.processing_class.eos_token_id])),
        processing_class=one.processing_class,
        model=one.policy_model,
        reward_model=one.reward_model,
        value_model=one.value_model,
        train_dataset=one.train_dataset,
        eval_dataset=one.eval_dataset,
        callbacks=[],
    )
    again.train()
    assert again.policy_model.is_gradient_checkpointing and again.value_model.is_gradient_checkpointing


@pytest.mark.parametrize(("kl", "factor"), [(12.0, 1 + 0.2 * 0.5), (6.6, 1 + 0.1 * 0.5), (0.0, 1 - 0.2 * 0.5)])
def test_the_coefficient_follows_the_kl(kl, factor):
    settings = PPOConfig(output_dir="x", kl_coef=0.1, report_to="none", bf16=False, use_cpu=True)
    settings.batch_size = 50
    logs = {"objective/kl": kl}
    AdaptiveKL(6.0, 100).on_log(settings, TrainerState(), TrainerControl(), logs=logs)
    assert settings.kl_coef == pytest.approx(0.1 * factor) and logs["objective/kl_coef"] == 0.1

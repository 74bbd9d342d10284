"""PPO's trainer: an update against a naive PPO, resumed runs against uninterrupted ones, positions, settings."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from naive_ppo import LORA, Naive, load_policy, settings_for
from tiny_models import PROMPTS, make_model, make_tokenizer, save_model
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForSequenceClassification,
    TrainerCallback,
    set_seed,
)

from rewarded_lines.engines.responses import ResponseReader
from rewarded_lines.errors import UserError
from rewarded_lines.training import ppo_critic
from rewarded_lines.training.ppo_critic import CriticOptimizer
from rewarded_lines.training.ppo_trainer import PPOTrainer
from rewarded_lines.training.training_record import MetricsCallback, last_checkpoint

# One token in six ends a response.
ENDS = frozenset(range(2, 300, 6))


def score(row, completion_ids, **_):
    """Score a response by its tokens and its row; every fifth row has no score."""
    return [None if at % 5 == 3 else sum(ids) % 7 / 3 + at for at, ids in zip(row, completion_ids, strict=True)]


def make_critic():
    torch.manual_seed(7)
    return LlamaForSequenceClassification(LlamaConfig(**{**make_model(0, blocks=2).config.to_dict(), "num_labels": 1}))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_model(make_model(0, blocks=2), tmp_path_factory.mktemp("base"))


def make_trainer(folder, base, lora=False, reward=score, model=None, ends=ENDS, **more):
    folder.mkdir(exist_ok=True)
    set_seed(0)
    policy = model or load_policy(base)
    tokenizer = make_tokenizer()
    prompts = [f"{prompt} {number}" for prompt in PROMPTS for number in range(3)]
    args = settings_for(folder, **more)
    return PPOTrainer(
        model=policy,
        critic=None if args.critic == "shared" else make_critic(),
        args=args,
        reader=ResponseReader(tokenizer, ends),
        chats=False,
        reward_funcs=reward,
        train_dataset=Dataset.from_dict({"prompt": prompts, "row": range(len(prompts))}),
        processing_class=tokenizer,
        peft_config=LORA if lora else None,
        callbacks=[MetricsCallback(folder)],
    )


def rows_of(batch):
    columns = (batch[name].tolist() for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask"))
    return [
        ([a for a, b in zip(p, pm, strict=True) if b], [a for a, b in zip(c, cm, strict=True) if b])
        for p, pm, c, cm in zip(*columns, strict=True)
    ]


@pytest.mark.parametrize(
    ("critic", "lora", "more"),
    [
        ("separate", False, {}),
        ("shared", False, {"num_generations": 2}),
        ("separate", True, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}),
        ("shared", True, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}),
    ],
    ids=["separate", "shared", "lora", "lora-shared"],
)
def test_an_update_is_that_of_a_naive_ppo(tmp_path, base, critic, lora, more):
    scores, batches, losses = [], [], []

    def reward(row, completion_ids, **_):
        scores.extend(score(row, completion_ids))
        return scores

    trainer = make_trainer(
        tmp_path, base, lora, reward, critic=critic, optim="sgd", max_grad_norm=0.0, total_episodes=8, **more
    )
    naive = Naive(trainer, base, lora)
    sampled, loss = trainer._generate_and_score_completions, trainer._compute_loss
    trainer._generate_and_score_completions = lambda inputs: batches.append(sampled(inputs)) or batches[-1]
    trainer._compute_loss = lambda model, inputs: losses.append((rows_of(inputs), loss(model, inputs))) or losses[-1][1]
    trainer.train()

    (batch,) = batches
    rows = rows_of(batch)
    # What is sampled ends at its first end token.
    assert all(not ENDS.intersection(ids[:-1]) for _, ids in rows)
    assert len({len(ids) for _, ids in rows}) > 1 and None in scores and trainer.unscored == scores.count(None)
    made = naive.roll(rows, scores)
    parts = trainer.args.gradient_accumulation_steps
    assert len(losses) == 2 * 2 * parts
    for start in range(0, len(losses), parts):
        mini = losses[start : start + parts]
        wanted = naive.step([row for rows, _ in mini for row in rows], made)
        assert sum(one.item() for _, one in mini) == pytest.approx(wanted, abs=2e-5)
    for part, other in ((trainer.model, naive.policy), (trainer.critic, naive.critic)):
        for (name, weight), second in zip(part.named_parameters(), other.parameters(), strict=True):
            assert torch.allclose(weight, second, atol=2e-5), name
    (line,) = [one for one in metrics(tmp_path) if "objective/kl" in one]
    there = [one for one in scores if one is not None]
    assert line["objective/scores"] == pytest.approx(sum(there) / len(there))
    assert line["objective/kl"] == 0 or lora
    assert line["clip_ratio/region_mean"] > 0 and line["val/clipfrac_avg"] > 0


def trained(one):
    parts = {
        "policy": one.model,
        "critic": one.critic,
        **({} if one.ref_model is None else {"reference": one.ref_model}),
    }
    return {
        f"{key}.{name}": weight.clone() for key, part in parts.items() for name, weight in part.state_dict().items()
    }


def metrics(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("seconds", "step_time")} for line in lines]


MOVING = {"sync_ref_model": True, "ref_model_mixup_alpha": 0.25, "ref_model_sync_steps": 1}


def test_the_reference_is_an_average_of_the_policy_after_each_update(tmp_path, base):
    trainer = make_trainer(tmp_path, base, total_episodes=16, **MOVING)
    wanted = {name: weight.clone() for name, weight in trainer.ref_model.state_dict().items()}

    class Average(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **_):
            for name, weight in model.state_dict().items() if state.global_step % 4 == 0 else ():
                wanted[name].lerp_(weight, 0.25)

    trainer.add_callback(Average())
    trainer.train()
    found, start = trainer.ref_model.state_dict(), load_policy(base).state_dict()
    assert all(torch.allclose(found[name], weight, atol=1e-6) for name, weight in wanted.items())
    assert any(not torch.allclose(found[name], start[name], atol=1e-3) for name in start)


# 15 prompts in batches of 8 make one update an epoch, so the checkpoint is two epochs after the start.
@pytest.mark.parametrize(
    ("critic", "lora"), [pytest.param("separate", False, marks=pytest.mark.slow), ("shared", False), ("separate", True)]
)
def test_a_resumed_run_has_the_numbers_of_an_uninterrupted_one(tmp_path, base, critic, lora):
    more = {"critic": critic, "total_episodes": 40, "target_kl": 0.01, "kl_horizon": 100, "learning_rate": 1e-3}
    more |= {} if lora else MOVING
    whole = make_trainer(tmp_path / "whole", base, lora, save_strategy="steps", save_steps=2, **more)
    whole.train()
    # The state after a kill at the third of five updates, each of four steps.
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    for step in (16, 20):
        shutil.rmtree(tmp_path / "killed" / f"checkpoint-{step}")

    resumed = make_trainer(tmp_path / "killed", base, lora, save_strategy="no", **more)
    checkpoint = last_checkpoint(tmp_path / "killed")
    assert checkpoint == str(tmp_path / "killed" / "checkpoint-8")
    resumed.train(resume_from_checkpoint=checkpoint)
    first, second = trained(whole), trained(resumed)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    expected, found = ([line for line in metrics(tmp_path / one) if "loss" in line] for one in ("whole", "killed"))
    assert found == expected and [line["step"] for line in found] == [4, 8, 12, 16, 20]
    assert found[1]["objective/kl_coef"] != found[-1]["objective/kl_coef"]
    assert resumed.kl_coef == whole.kl_coef

    if not lora:
        kept = Path(checkpoint, "reference.safetensors").rename(tmp_path / "kept")
        with pytest.raises(UserError, match="a checkpoint without the moving reference"):
            make_trainer(tmp_path / "killed", base, lora, **more).train(resume_from_checkpoint=checkpoint)
        kept.rename(Path(checkpoint, "reference.safetensors"))
    # A checkpoint of TRL's PPOTrainer had no such file.
    (tmp_path / "killed" / "checkpoint-8" / "critic_optimizer.pt").unlink()
    again = make_trainer(tmp_path / "killed", base, lora, **more)
    with pytest.raises(UserError, match="no critic of this trainer(.|\n)*--overwrite true"):
        again.train(resume_from_checkpoint=checkpoint)


def test_positions_are_those_of_sampling(tmp_path):
    config = GPT2Config(vocab_size=300, n_embd=32, n_layer=1, n_head=2, n_positions=64, eos_token_id=2, pad_token_id=0)
    torch.manual_seed(0)
    model = save_model(GPT2LMHeadModel(config), tmp_path / "gpt2")
    torch.nn.init.normal_((policy := GPT2LMHeadModel.from_pretrained(model)).transformer.wpe.weight)
    policy.save_pretrained(model)
    made = []
    trainer = make_trainer(tmp_path, None, model=GPT2LMHeadModel.from_pretrained(model), kl_coef=0.0)
    own = trainer._add_advantages
    trainer._add_advantages = lambda batch, values: made.append(dict(batch)) or own(batch, values)
    trainer.train()
    (batch,) = made
    assert not batch["prompt_mask"].all()
    found = zip(rows_of(batch), batch["old_per_token_logps"], batch["ref_per_token_logps"], strict=True)
    with torch.no_grad():
        for (prompt, response), *both in found:
            wanted = Naive.logprobs(None, policy, prompt, response)
            assert all(torch.allclose(one[: len(response)], wanted, atol=1e-5) for one in both)


def test_gradient_checkpointing_changes_no_number(tmp_path, base):
    lines = []
    for on in (False, True):
        trainer = make_trainer(tmp_path / str(on), base, lora=True, gradient_checkpointing=on)
        trainer.train()
        assert trainer.critic.model.is_gradient_checkpointing == on
        lines.append([line["loss"] for line in metrics(tmp_path / str(on)) if "loss" in line])
    assert lines[0] == pytest.approx(lines[1], abs=1e-6)


def test_processes_share_what_the_critic_trains(monkeypatch):
    """NCCL cannot send all parts of frozen weights of four bits."""
    sent = []
    monkeypatch.setattr(ppo_critic, "broadcast", sent.append)
    critic = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
    critic[0].requires_grad_(False)
    CriticOptimizer(critic, SimpleNamespace(num_processes=2), 0.0)
    assert [one.data_ptr() for one in sent] == [one.data_ptr() for one in critic[1].parameters()]


def test_each_update_is_logged_under_the_names_of_earlier_logs(tmp_path, base):
    trainer = make_trainer(tmp_path, base, total_episodes=16, learning_rate=0.0, kl_estimator="k3", whiten_rewards=True)
    trainer.train()
    lines = [line for line in metrics(tmp_path) if "objective/kl" in line]
    assert [line["step"] for line in lines] == [4, 8] and lines[0]["max_steps"] == 8
    names = ("scores", "entropy", "non_score_reward", "rlhf_reward", "kl_coef")
    assert all(f"objective/{name}" in lines[0] for name in names)
    assert {"loss/policy_avg", "loss/value_avg", "val/clipfrac_avg"} <= lines[0].keys()


class Engine:
    """What TRL's vLLM returns: tokens after the end, and how likely each was."""

    def __init__(self, **parts):
        self.parts, self.calls, self.synced = parts, [], 0
        self.vllm_client = self

    def get_server_info(self):
        return {"model_config": {"logprobs_mode": "processed_logprobs"}}

    def sync_weights(self):
        self.synced += 1

    def generate(self, prompts, images, num_generations, profiler):
        self.calls.append(len(prompts))
        ids = [[3 + at, 5, 2, 7] if at % 2 else [9, 2, 7, 7] for at in range(len(prompts))]
        return prompts, ids, [[[-5.5]] * 4] * len(prompts), None


@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_vllms_responses_are_cut_and_weighted(tmp_path, base, monkeypatch, mode):
    monkeypatch.setattr("trl.trainer.grpo_trainer.VLLMGeneration", Engine)
    trainer = make_trainer(
        tmp_path, base, ends=frozenset([2]), use_vllm=True, vllm_mode=mode, total_episodes=16,
        vllm_importance_sampling_mode="sequence_truncate",
    )  # fmt: skip
    made, own = [], trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda inputs: made.append(own(inputs)) or made[-1]
    trainer.train()
    engine = trainer.vllm_generation
    assert engine.parts["mode"] == mode and engine.parts["generation_kwargs"] == {"stop_token_ids": [2]}
    # Two updates, each with the whole batch at once and new weights.
    assert engine.calls == [8, 8] and engine.synced == 2
    assert [len(ids) for _, ids in rows_of(made[0])] == [2, 3] * 4
    gap = ((made[0]["old_per_token_logps"] + 5.5) * made[0]["completion_mask"]).sum(1, keepdim=True)
    assert torch.allclose(made[0]["importance_sampling_ratio"], gap.exp().clamp(max=3.0), atol=1e-5)

"""PPO as the papers write it, one response at a time and without padding, and settings for it and the trainer."""

import copy

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from rewarded_lines.training.ppo_config import PPOConfig

GAMMA, LAM, KL, CLIP, CLIP_VALUE, VF, TEMPERATURE, RATE = 0.98, 0.9, 0.3, 0.05, 0.05, 0.7, 1.3, 0.05
LORA = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)


def load_policy(folder):
    return LlamaForCausalLM.from_pretrained(folder)


def settings_for(folder, **more):
    own = {
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_mini_batches": 2, "num_ppo_epochs": 2,
        "total_episodes": 8, "response_length": 6, "local_rollout_forward_batch_size": 3, "learning_rate": RATE,
        "lr_scheduler_type": "constant", "gamma": GAMMA, "lam": LAM, "kl_coef": KL, "cliprange": CLIP,
        "cliprange_value": CLIP_VALUE, "vf_coef": VF, "temperature": TEMPERATURE, "logging_steps": 1,
        "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True, "bf16": False,
        "gradient_checkpointing": False,
    }  # fmt: skip
    return PPOConfig(output_dir=str(folder), **{**own, **more})


class Naive:
    """PPO one response at a time, without padding, as the papers write it."""

    def __init__(self, trainer, base, lora):
        # Not a copy: TRL changed the trainer's own model.
        self.policy, self.reference = (load_policy(base) for _ in range(2))
        if lora:
            self.policy = get_peft_model(self.policy, LORA)
        self.policy.load_state_dict(trainer.model.state_dict())
        self.shared, self.critic = trainer._ppo.critic == "shared", copy.deepcopy(trainer.critic)
        weights = [*self.policy.parameters(), *self.critic.parameters()]
        self.optimizer = torch.optim.SGD([one for one in weights if one.requires_grad], lr=RATE)

    def logprobs(self, model, prompt, response):
        logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1] / TEMPERATURE
        return logits.log_softmax(-1)[range(len(response)), response]

    def values(self, prompt, response):
        ids, keep = torch.tensor([prompt + response]), slice(len(prompt) - 1, -1)
        if self.shared:
            hidden = self.policy(input_ids=ids, output_hidden_states=True).hidden_states[-1]
            return self.critic.head(hidden[0, keep])[:, 0]
        return self.critic.model.score(self.critic.model.model(input_ids=ids).last_hidden_state[0, keep])[:, 0]

    @torch.no_grad()
    def roll(self, rows, scores):
        """Return each response's log probabilities, values, advantages and returns."""
        made = {}
        for row, points in zip(rows, scores, strict=True):
            if points is None:
                continue
            old, values = self.logprobs(self.policy, *row), self.values(*row)
            rewards = -KL * (old - self.logprobs(self.reference, *row))
            rewards[-1] += points
            later, after, advantages = 0.0, 0.0, []
            for t in reversed(range(len(row[1]))):
                later = rewards[t] + GAMMA * after - values[t] + GAMMA * LAM * later
                after = values[t]
                advantages.insert(0, later)
            made[str(row)] = [old, values, torch.stack(advantages), torch.stack(advantages) + values]
        everything = torch.cat([one[2] for one in made.values()])
        for one in made.values():
            one[2] = (one[2] - everything.mean()) / (everything.var() + 1e-8).sqrt()
        return made

    def step(self, rows, made):
        """Take a step on a mini-batch; return its loss."""
        losses = []
        for row in rows:
            if str(row) not in made:
                continue
            old, values_before, advantages, returns = made[str(row)]
            ratio = (self.logprobs(self.policy, *row) - old).exp()
            gain = torch.min(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages)
            values = self.values(*row)
            near = values_before + (values - values_before).clamp(-CLIP_VALUE, CLIP_VALUE)
            worse = torch.max((values - returns) ** 2, (near - returns) ** 2)
            losses.append(-gain + VF * 0.5 * worse)
        loss = torch.cat(losses).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()

"""PPO on TRL's GRPOTrainer: generation, the clipped ratio, adapters, resuming and several processes are TRL's.

What is here: the critic, rewards and advantages of single tokens, and the loss over whole mini-batches.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from trl import GRPOTrainer

from rewarded_lines.engines.responses import ResponseReader
from rewarded_lines.training.online_trainer import OnlineTrainer
from rewarded_lines.training.ppo_config import PPOConfig
from rewarded_lines.training.ppo_critic import CriticOptimizer, SharedCritic, prepare_critic
from rewarded_lines.training.ppo_math import (
    adapted_coefficient,
    estimate_advantages,
    kl_estimate,
    mini_batches,
    token_rewards,
    value_losses,
    whiten,
)


class PPOTrainer(OnlineTrainer, GRPOTrainer):  # type: ignore[misc]
    """Proximal policy optimization with a critic; see `ppo_math` for the equations.

    A response ends where its `ResponseReader` ends it, and its score is the reward of its last token. A response
    without a score is in no loss and in no mean. A mini-batch's loss is the mean over all its tokens, however it is
    split for memory or over processes.

    A resumed run has the numbers of an uninterrupted one, since checkpoints are written between two rounds of sampling.

    Attributes:
        kl_coef: weight of the KL penalty, which `target_kl` adapts.
    """

    def __init__(
        self, *, model: Any, args: PPOConfig, reader: ResponseReader, chats: bool, critic: Any = None, **parts: Any
    ) -> None:
        """Build TRL's trainer with `parts`; `critic` is a classifier of one number, None for a shared critic.

        Raises:
            UserError: too few prompts for an update, or settings that DeepSpeed cannot take.
        """
        settings = args.settings(len(parts["train_dataset"]))
        super().__init__(model=model, args=settings, reader=reader, chats=chats, **parts)
        self.args: Any
        self.state: Any
        self._ppo, self.kl_coef = args, args.kl_coef
        # The KL is in the reward, not in TRL's loss.
        self.beta = 0.0
        policy = self.accelerator.unwrap_model(self.model)
        policy = getattr(policy, "get_base_model", lambda: policy)()
        if critic is None:
            self.critic: Any = SharedCritic(policy).to(self.accelerator.device)
        else:
            self.critic = prepare_critic(critic, self.accelerator, settings)
        self._critic_optimizer = CriticOptimizer(self.critic, self.accelerator, settings.max_grad_norm)

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    def _total(self, part: Tensor) -> Tensor:
        """Return the sum of a number over all processes."""
        return self.accelerator.reduce(part, "sum")

    def _log_means(self, **measures: Tensor) -> None:
        """Log means over the processes; names have `__` for a slash."""
        means = self.accelerator.reduce(torch.stack([one.float() for one in measures.values()]), "mean")
        for name, mean in zip(measures, means.tolist(), strict=True):
            self._metrics[self._mode][name.replace("__", "/")].append(mean)

    # Sampling.

    def _generate_single_turn(self, prompt_ids: list[list[int]], *rest: Any) -> Any:
        size = len(prompt_ids) if self.use_vllm else self._ppo.local_rollout_forward_batch_size
        parts = [
            super(PPOTrainer, self)._generate_single_turn(prompt_ids[start : start + size], *rest)
            for start in range(0, len(prompt_ids), size)
        ]
        if len(parts) == 1:
            return parts[0]
        return [row for rows, _ in parts for row in rows], None

    def _calculate_rewards(self, inputs: Any, prompts: Any, *rest: Any) -> Tensor:
        rewards = super()._calculate_rewards(inputs, prompts, *rest)
        first = self.accelerator.process_index * len(prompts)
        own = rewards[first : first + len(prompts)]
        scores = (own * self.reward_weights.to(own.device)).nansum(dim=1)
        self._scores = scores.masked_fill(own.isnan().all(dim=1), torch.nan)
        return rewards

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, batch_size: Any = None,
        **more: Any,
    ) -> Any:  # fmt: skip
        if not torch.is_grad_enabled():
            batch_size = self._ppo.local_rollout_forward_batch_size
        # The policy's pass comes first, then its reference, which may be the same modules without the adapter.
        listens = isinstance(self.critic, SharedCritic) and not self.critic.seen
        if listens:
            self.critic.listening = True
        try:
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, batch_size, **more
            )
        finally:
            if listens:
                self.critic.listening = False

    def _values(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the critic's value before each token of the responses."""
        count = batch["completion_ids"].shape[1]
        with self.accelerator.autocast():
            if isinstance(self.critic, SharedCritic):
                hidden = torch.cat(self.critic.seen)
                self.critic.seen.clear()
                return self.critic(hidden, count)  # type: ignore[no-any-return]
            ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
            mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
            size = len(ids) if torch.is_grad_enabled() else self._ppo.local_rollout_forward_batch_size
            parts = zip(ids.split(size), mask.split(size), strict=True)
            return torch.cat([self.critic(*part, count) for part in parts])

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        # TRL computes the log probabilities of the reference if there is a KL penalty, and those of the policy if
        # samples are used more than once.
        self.beta, self.num_iterations = 1.0, self.num_iterations + 1
        try:
            made: dict[str, Any] = super()._generate_and_score_completions(inputs)
        finally:
            self.beta, self.num_iterations = 0.0, self.num_iterations - 1
        with torch.no_grad():
            values = self._values(made)
            self._add_advantages(made, values)
        self._correct_logs(made)
        return made

    def _correct_logs(self, made: dict[str, Any]) -> None:
        """Show the mean advantage of a response's tokens; TRL compares its score with those of its group."""
        means = (made["advantages"] * made["tool_mask"]).sum(1) / made["tool_mask"].sum(1).clamp(min=1)
        shown: Any = self._logs["advantages"]
        own = self.accelerator.gather(means).tolist()
        shown.extend([*list(shown)[: -len(own)], *own])
        if self.args.num_generations == 1:
            self._metrics[self._mode].pop("frac_reward_zero_std", None)

    def _add_advantages(self, made: dict[str, Any], values: Tensor) -> None:
        """Turn scores into advantages and returns of tokens, log them, and adapt the KL coefficient."""
        ppo, scored = self._ppo, ~self._scores.isnan()
        mask = (made["completion_mask"] * scored[:, None]).bool()
        logprobs, reference = made["old_per_token_logps"].float(), made.pop("ref_per_token_logps").float()
        kl = kl_estimate(logprobs, reference, ppo.kl_estimator) * mask
        scores = self._scores.nan_to_num()
        rewards = token_rewards(scores, kl, mask, self.kl_coef)
        self._log_rollouts(kl, -logprobs * mask, scores, scored)
        if ppo.whiten_rewards:
            rewards = whiten(rewards, mask, False, self._total)
        advantages = estimate_advantages(rewards, values, mask, ppo.gamma, ppo.lam)
        made |= {
            "advantages": whiten(advantages, mask, total=self._total),
            "values": values,
            "returns": advantages + values,
            # TRL leaves tokens out of the loss by this name.
            "tool_mask": mask.int(),
        }

    def _log_rollouts(self, kl: Tensor, surprise: Tensor, scores: Tensor, scored: Tensor) -> None:
        """Log means over the responses that have a score."""
        counted = self._total(torch.stack([scored.sum().float(), kl.sum(), surprise.sum(), scores.sum()])).tolist()
        count, episodes = max(counted[0], 1.0), len(scored) * self.accelerator.num_processes
        kl_mean, entropy, score = (one / count for one in counted[1:])
        logged = {
            "objective/kl": kl_mean, "objective/entropy": entropy, "objective/scores": score,
            "objective/non_score_reward": -self.kl_coef * kl_mean,
            "objective/rlhf_reward": score - self.kl_coef * kl_mean,
            "objective/kl_coef": self.kl_coef,
        }  # fmt: skip
        if counted[0]:
            for name, value in logged.items():
                self._metrics[self._mode][name].append(value)
        updates = self.state.global_step // self._ppo.steps_per_update + 1
        self._metrics[self._mode]["episode"] = [updates * episodes]
        if self.model.training and self._ppo.target_kl is not None and counted[0]:
            target, horizon = self._ppo.target_kl, self._ppo.kl_horizon
            self.kl_coef = adapted_coefficient(self.kl_coef, kl_mean, target, horizon, episodes)

    # Updates.

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if self._buffered_inputs is before:
            return inputs
        batches = mini_batches(self._buffered_inputs, self.args.gradient_accumulation_steps)
        counts = self._total(torch.stack([sum(one["tool_mask"].sum() for one in batch) for batch in batches]).float())
        for batch, count in zip(batches, counts, strict=True):
            for one in batch:
                # The tokens of the mini-batch in all processes; TRL divides them by the number of mini-batches.
                one["num_items_in_batch"] = count * len(batches)
        self._buffered_inputs = [one for batch in batches for one in batch]
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    def _compute_loss(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        policy_loss: Tensor = super()._compute_loss(model, inputs)
        values, mask = self._values(inputs), inputs["tool_mask"]
        losses, clipped = value_losses(values, inputs["values"], inputs["returns"], self._ppo.cliprange_value)
        tokens = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
        times = 1
        if self.model.training:
            times = self.current_gradient_accumulation_steps
            tokens = tokens * times / self.args.steps_per_generation
        value_loss = (losses * mask).sum() / tokens
        self._log_means(
            loss__policy_avg=policy_loss.detach() * times,
            loss__value_avg=value_loss.detach() * times,
            val__clipfrac_avg=(clipped * mask).sum() / tokens * times,
        )
        return policy_loss + self._ppo.vf_coef * value_loss

    def training_step(self, *given: Any) -> Tensor:
        """Take a step of TRL's trainer; the critic's optimizer steps where the policy's does."""
        loss: Tensor = super().training_step(*given)
        if self.accelerator.sync_gradients:
            self._critic_optimizer.step(self._get_learning_rate())
        return loss

    def create_optimizer(self, model: Any = None) -> Any:
        """Create the policy's optimizer, and another one of its kind for the critic."""
        created = super().create_optimizer(model)
        if self._critic_optimizer.inner is None:
            self.optimizer = None
            self._critic_optimizer.inner = super().create_optimizer(self.critic)
            self.optimizer = created
        return created

    # Checkpoints.

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            self._critic_optimizer.save(Path(output_dir), kl_coef=self.kl_coef)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            # First, since it refuses checkpoints of other trainers.
            self.kl_coef = self._critic_optimizer.load(Path(checkpoint))["kl_coef"]
        super()._load_optimizer_and_scheduler(checkpoint)

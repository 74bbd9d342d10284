"""The critic of PPO: a model of its own or a value head on the policy, with its own optimizer."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from trl.trainer.utils import disable_dropout_in_model

from rewarded_lines.errors import fail
from rewarded_lines.training.online_trainer import token_places
from rewarded_lines.training.sampling import is_quantized

_WEIGHTS, _OPTIMIZER, _STATE = "critic.safetensors", "critic_optimizer.pt", "ppo.json"


def _read(head: Any, hidden: Tensor) -> Tensor:
    """Return a head's values, in its own precision: autocast would round them to 8 bits."""
    with torch.autocast(hidden.device.type, enabled=False):
        return head(hidden.to(next(head.parameters()))).squeeze(-1).float()  # type: ignore[no-any-return]


class SeparateCritic(nn.Module):
    """A transformer with a head of one number, such as a reward model."""

    def __init__(self, model: Any) -> None:
        """Take a decoder's classifier of transformers, with its head in `score`."""
        super().__init__()
        self.model = model
        if not isinstance(getattr(model, "score", None), nn.Module):
            raise fail("the model cannot be a critic", where="critic_model", expected="a decoder with a head `score`")

    def forward(self, input_ids: Tensor, attention_mask: Tensor, count: int) -> Tensor:
        """Return the value before each of the last `count` tokens, shape (rows, count)."""
        body = getattr(self.model, self.model.base_model_prefix)
        places = token_places(attention_mask)
        hidden = body(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=places, use_cache=False
        ).last_hidden_state
        return _read(self.model.score, hidden[:, -count - 1 : -1])


class SharedCritic(nn.Module):
    """A value head on the policy's last hidden states, which it keeps from the policy's own forward pass.

    Attributes:
        seen: hidden states of the forward passes since it was emptied.
    """

    def __init__(self, policy: Any) -> None:
        """Listen to a causal language model; the head's values begin at 0."""
        super().__init__()
        self.head = nn.Linear(policy.config.get_text_config().hidden_size, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.seen: list[Tensor] = []
        self.listening = False
        policy.base_model.register_forward_hook(self._keep)

    def _keep(self, module: Any, inputs: Any, output: Any) -> None:
        if self.listening:
            self.seen.append(output.last_hidden_state)

    def forward(self, hidden: Tensor, count: int) -> Tensor:
        """Return the value before each of the last `count` tokens, shape (rows, count)."""
        return _read(self.head, hidden[:, -count - 1 : -1])


class CriticOptimizer:
    """Trains a critic beside the policy, whatever wraps the policy.

    Every process holds the whole critic. Gradients are averaged here, so FSDP and DeepSpeed need not know it.
    """

    def __init__(self, critic: nn.Module, accelerator: Accelerator, max_grad_norm: float) -> None:
        """Give all processes the critic of the first."""
        self._critic, self._accelerator, self._max_norm = critic, accelerator, max_grad_norm
        if accelerator.num_processes > 1:
            # Frozen weights are alike, since all processes read the same files. Quantized ones have parts that NCCL
            # cannot send.
            for weight in critic.parameters():
                if weight.requires_grad:
                    broadcast(weight.data)
        self.inner: Any = None

    def step(self, learning_rate: float) -> None:
        """Average the gradients over the processes, clip them, and take a step."""
        weights = [weight for weight in self._critic.parameters() if weight.grad is not None]
        if self._accelerator.num_processes > 1:
            for weight in weights:
                weight.grad = self._accelerator.reduce(weight.grad, "mean")
        scaler: Any = self._accelerator.scaler
        take: Callable[[], Any] = self.inner.step
        if scaler is not None:
            scaler.unscale_(self.inner)
            take = partial(scaler.step, self.inner)
        if self._max_norm > 0:
            nn.utils.clip_grad_norm_(weights, self._max_norm)
        for group in self.inner.param_groups:
            group["lr"] = learning_rate
        take()
        self.inner.zero_grad()

    def save(self, folder: Path, **progress: float) -> None:
        """Save the trained weights, the optimizer's state and `progress` into a checkpoint."""
        save_file(self._trained(), folder / _WEIGHTS)
        torch.save(self.inner.state_dict(), folder / _OPTIMIZER)
        (folder / _STATE).write_text(json.dumps(progress), encoding="utf-8")

    def load(self, folder: Path) -> dict[str, float]:
        """Restore what `save` saved; return `progress`."""
        saved = load_file(folder / _WEIGHTS) if (folder / _OPTIMIZER).is_file() else {}
        if saved.keys() != self._trained().keys():
            raise fail(
                "the checkpoint's critic is another one" if saved else "the checkpoint has no critic of this trainer",
                where=str(folder),
                remedy="start again with --overwrite true",
            )
        self._critic.load_state_dict(saved, strict=False)
        self.inner.load_state_dict(torch.load(folder / _OPTIMIZER, map_location="cpu", weights_only=True))
        return dict(json.loads((folder / _STATE).read_text(encoding="utf-8")))

    def _trained(self) -> dict[str, Tensor]:
        weights = self._critic.named_parameters()
        return {name: weight.detach().contiguous() for name, weight in weights if weight.requires_grad}


def prepare_critic(critic: Any, accelerator: Accelerator, settings: Any) -> Any:
    """Put a separate critic on its device, without dropout and with gradient checkpointing if that is set."""
    if settings.disable_dropout:
        disable_dropout_in_model(critic)
    if settings.gradient_checkpointing:
        critic.gradient_checkpointing_enable(settings.gradient_checkpointing_kwargs or {"use_reentrant": False})
    return SeparateCritic(critic if is_quantized(critic) else critic.to(accelerator.device)).train()

"""TRL's PPOTrainer with several end tokens, several processes, resuming and an adaptive KL.

The loop and the mathematics are TRL's.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import load_checkpoint_in_model
from peft import set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback

from rewarded_lines.checkpoints.adapters import ADAPTER_FILE
from rewarded_lines.engines.responses import ResponseReader
from rewarded_lines.errors import fail

try:
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer
except ImportError as error:
    raise fail(
        f"trl {version('trl')} has no PPO",
        expected="trl 1.12.0, the last release that carries it (trl.experimental.ppo)",
        remedy="pip install trl==1.12.0, or train without a critic: "
        "accelerate launch recipes/rloo.py --config recipes/configs/demo/rloo.yaml --reward NAME",
    ) from error

_CRITIC_FILE = "critic.safetensors"
_PROGRESS_FILE = "ppo.json"


class AdapterOff(nn.Module):
    """The reference model of a policy with an adapter: the same model with the adapter off.

    TRL's own way (no reference model, `null_ref_context`) fails if DistributedDataParallel wraps the policy.
    """

    def __init__(self, policy: Any) -> None:
        """Refer to `policy`; its parameters do not become this module's."""
        super().__init__()
        # A tuple hides the policy from `nn.Module`, which would make it a submodule.
        self._held = (policy,)

    def forward(self, **inputs: Any) -> Any:
        """Return the base model's output."""
        with self._held[0].disable_adapter():
            return self._held[0](**inputs)


class ResumablePPOTrainer(PPOTrainer):  # type: ignore[misc]
    """PPOTrainer whose resumed runs have the numbers of an uninterrupted one."""

    def __init__(
        self, *, model: Any, args: PPOConfig, reader: ResponseReader, ref_model: Any = None, **parts: Any
    ) -> None:
        """Build TRL's trainer with `parts`; an adapter on the model makes a `ref_model` unnecessary.

        `stop_token`, `stop_token_id` and `missing_eos_penalty` of the configuration must be None.
        """
        if ref_model is None and hasattr(model, "disable_adapter"):
            ref_model = AdapterOff(model)
        super().__init__(model=model, args=args, ref_model=ref_model, **parts)
        self._reader = reader
        pad: int = parts["processing_class"].pad_token_id
        # Generation pads after each of these. TRL ends a response at its first padding token, even a sampled one, so
        # padding is an end token, too.
        self.policy_model.generation_config.eos_token_id = sorted({*reader.ends, pad})
        self.policy_model.generation_config.pad_token_id = pad
        if reader.stop:
            # With an id, TRL calls `truncate_response`, which `_cutting` replaces.
            self.stop_token_id = pad
        self.args: Any
        self.state: Any
        if args.gradient_checkpointing:
            # TRL's PPO reads the setting, but does not switch it on.
            for part in (model, self.value_model):
                part.gradient_checkpointing_enable({"use_reentrant": False})
            self.accelerator.unwrap_model(self.model).is_gradient_checkpointing = True
        self.dataloader: Any = _Continued(self.dataloader, args.seed)

    def train(self, resume_from_checkpoint: str | None = None) -> None:  # type: ignore[override]
        """Train, from the start or from a checkpoint of this class."""
        with self._cutting():
            if resume_from_checkpoint is None:
                super().train()
            else:
                self._resume(resume_from_checkpoint)

    @contextmanager
    def _cutting(self) -> Iterator[None]:
        """Make TRL cut responses where the reader ends them, at stop texts, too."""
        own = ppo_trainer.truncate_response

        def cut(stop_token_id: int, pad_token_id: int, responses: torch.Tensor) -> torch.Tensor:
            lengths = [len(self._reader.cut((), row)[0]) for row in responses.tolist()]
            places = torch.arange(responses.shape[1], device=responses.device)
            behind = places >= torch.tensor(lengths, device=responses.device)[:, None]
            return responses.masked_fill(behind, pad_token_id)

        ppo_trainer.truncate_response = cut
        try:
            yield
        finally:
            ppo_trainer.truncate_response = own

    def _resume(self, checkpoint: str) -> None:
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise fail(
                "a PPO run under FSDP or DeepSpeed cannot be resumed: its critic is sharded",
                where=checkpoint,
                remedy="start it again with --overwrite true, or train with recipes/rloo.py, whose runs can be resumed",
            )
        total = self.args.num_total_batches
        resume = _Resume(self, Path(checkpoint))
        self.callback_handler.callbacks.insert(0, resume)
        try:
            super().train()
        finally:
            self.callback_handler.callbacks.remove(resume)
            self.args.num_total_batches = total

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the policy without the critic and without DistributedDataParallel's wrapper."""
        with self._unwrapped():
            super().save_model(output_dir, _internal_call)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save a checkpoint with the critic; TRL writes the trainer's state, which completes it, last."""
        folder = Path(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            save_file(_trained(self.value_model), folder / _CRITIC_FILE)
            (folder / _PROGRESS_FILE).write_text(json.dumps({"kl_coef": self.args.kl_coef}), encoding="utf-8")
        with self._unwrapped():
            super()._save_checkpoint(model, trial)

    @contextmanager
    def _unwrapped(self) -> Iterator[None]:
        """Remove the wrapper for the block: TRL reads `.policy` and `.config`, which the wrapper does not have."""
        wrapped = self.model
        if isinstance(wrapped, DistributedDataParallel):
            self.model = wrapped.module
        try:
            yield
        finally:
            self.model = wrapped


class AdaptiveKL(TrainerCallback):
    """Adapts the KL coefficient β until the KL to the SFT model is at a target.

        e = clip((KL − target)/target, −0.2, 0.2),   β ← β·(1 + e·n/horizon),   n episodes a step

    (Ziegler et al., Fine-Tuning Language Models from Human Preferences, 2019, section 2.2.)
    """

    def __init__(self, target: float, horizon: int) -> None:
        """Aim at `target` nats; `horizon` is in episodes."""
        self._target, self._horizon = target, horizon

    def on_log(self, args: Any, *_: Any, logs: Any = None, **__: Any) -> None:
        """Log the coefficient, then adapt it to the measured KL."""
        kl = (logs or {}).get("objective/kl")
        if kl is None:
            return
        logs["objective/kl_coef"] = args.kl_coef
        error = min(max((kl - self._target) / self._target, -0.2), 0.2)
        args.kl_coef *= 1 + error * args.batch_size / self._horizon


class _Continued:
    """A data loader that can skip batches."""

    def __init__(self, loader: Any, seed: int) -> None:
        self._loader = loader
        self._begun: Iterator[Any] | None = None
        sampler = loader.get_sampler()
        if getattr(sampler, "generator", self) is None:
            # With its own generator, a resumed run has the same order; the global random state differs.
            sampler.generator = torch.Generator().manual_seed(seed)

    def skip(self, batches: int) -> None:
        """Skip `batches`, which may be more than an epoch."""
        iterator = iter(self._loader)
        while batches:
            if next(iterator, None) is None:
                iterator = iter(self._loader)
            else:
                batches -= 1
        self._begun = iterator

    def __iter__(self) -> Iterator[Any]:
        iterator, self._begun = self._begun or iter(self._loader), None
        yield from iterator

    def __len__(self) -> int:
        return len(self._loader)


class _Resume(TrainerCallback):
    """Restores a checkpoint after PPOTrainer resets its counters and before it takes its first batch."""

    def __init__(self, trainer: ResumablePPOTrainer, folder: Path) -> None:
        self._trainer, self._folder = trainer, folder

    def on_train_begin(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        """Load models, optimizer and schedule and skip the used batches, then restore the random states.

        The random states come last, since the other steps draw random numbers.
        """
        trainer, folder = self._trainer, self._folder
        progress = json.loads((folder / _PROGRESS_FILE).read_text(encoding="utf-8"))
        saved = type(state).load_from_json(str(folder / "trainer_state.json"))
        if (folder / ADAPTER_FILE).is_file():
            set_peft_model_state_dict(trainer.policy_model, load_file(folder / ADAPTER_FILE))
        else:
            load_checkpoint_in_model(trainer.policy_model, str(folder))
        _load_critic(trainer.value_model, folder / _CRITIC_FILE)
        states: dict[str, Any] = {"optimizer.pt": trainer.optimizer, "scheduler.pt": trainer.lr_scheduler}
        for file, part in states.items():
            part.load_state_dict(torch.load(folder / file, map_location="cpu", weights_only=True))
        trainer.dataloader.skip(saved.global_step)
        state.global_step, state.episode = saved.global_step, saved.episode
        state.log_history, args.kl_coef = saved.log_history, progress["kl_coef"]
        # TRL's loop counts from 1 to this number.
        args.num_total_batches -= saved.global_step
        trainer._load_rng_state(str(folder))


def _load_critic(critic: nn.Module, file: Path) -> None:
    """Load the trained parameters of the critic; the others are the base's."""
    saved = load_file(file)
    if saved.keys() != _trained(critic).keys():
        raise fail(
            "the checkpoint's critic is another one", where=str(file), remedy="start again with --overwrite true"
        )
    critic.load_state_dict(saved, strict=False)


def _trained(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.detach().contiguous() for name, weight in model.named_parameters() if weight.requires_grad}

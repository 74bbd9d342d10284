"""TRL's PPOTrainer with what it lacks: all end tokens, several processes, checkpointing, resuming, an adaptive KL.

A thin subclass. The loop and the mathematics are TRL's.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import load_checkpoint_in_model
from peft import set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rewarded_lines.checkpoints.adapters import ADAPTER_FILE
from rewarded_lines.engines.responses import ResponseReader
from rewarded_lines.errors import fail

if TYPE_CHECKING:
    from peft import PeftModel

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

__all__ = ["AdaptiveKL", "PPOConfig", "ResumablePPOTrainer"]
CRITIC_FILE = "critic.safetensors"
_PROGRESS_FILE = "ppo.json"


class AdapterOff(nn.Module):
    """A policy with its adapter switched off, as the reference model: it takes no memory of its own.

    TRL's way (no reference model, `null_ref_context`) looks for the policy inside of what DistributedDataParallel has
    wrapped, and does not find it.
    """

    def __init__(self, policy: PeftModel) -> None:
        """Look at `policy`, whose parameters stay its own."""
        super().__init__()
        # In a tuple, so that it does not become a submodule here.
        self._held = (policy,)

    def forward(self, **inputs: Any) -> Any:
        """Return what the base model says."""
        (policy,) = self._held
        with policy.disable_adapter():
            return policy(**inputs)


class ResumablePPOTrainer(PPOTrainer):  # type: ignore[misc]
    """PPOTrainer that saves what it needs to go on, and goes on from it with the very numbers it would have had."""

    def __init__(
        self, *, model: Any, args: PPOConfig, reader: ResponseReader, ref_model: Any = None, **parts: Any
    ) -> None:
        """Build TRL's trainer.

        Args:
            model: the policy, with its adapter on it when it is to be trained by LoRA.
            args: the configuration; its `stop_token`, `stop_token_id` and `missing_eos_penalty` must be unset.
            reader: of the policy's responses, which says where they end.
            ref_model: the SFT model; not needed with an adapter.
            **parts: everything else that PPOTrainer takes.
        """
        if ref_model is None and hasattr(model, "disable_adapter"):
            ref_model = AdapterOff(model)
        super().__init__(model=model, args=args, ref_model=ref_model, **parts)
        self._reader = reader
        pad: int = parts["processing_class"].pad_token_id
        # Generation pads behind each of these. TRL takes the first padding for the end of a response, also where it was
        # sampled, so that ends one as well.
        self.policy_model.generation_config.eos_token_id = sorted({*reader.ends, pad})
        self.policy_model.generation_config.pad_token_id = pad
        if reader.stop:
            # Not None: TRL then cuts responses by `truncate_response`, which is ours while it trains.
            self.stop_token_id = pad
        self.args: Any
        self.state: Any
        if args.gradient_checkpointing:
            # TRL's PPO reads the setting and never switches it on.
            for part in (model, self.value_model):
                part.gradient_checkpointing_enable({"use_reentrant": False})
            self.accelerator.unwrap_model(self.model).is_gradient_checkpointing = True
        self.dataloader: Any = _Continued(self.dataloader, args.seed)

    def train(self, resume_from_checkpoint: str | None = None) -> None:  # type: ignore[override]
        """Train, from the start or from a checkpoint of this class."""
        with self._cutting():
            self._train(resume_from_checkpoint)

    @contextmanager
    def _cutting(self) -> Iterator[None]:
        """Let TRL cut responses behind what ends them, texts included."""
        own = ppo_trainer.truncate_response

        def cut(stop_token_id: int, pad_token_id: int, responses: torch.Tensor) -> torch.Tensor:
            lengths = [len(self._reader.cut((), row)[0]) for row in responses.tolist()]
            places = torch.arange(responses.shape[1], device=responses.device)
            return responses.masked_fill(
                places >= torch.tensor(lengths, device=responses.device)[:, None], pad_token_id
            )

        ppo_trainer.truncate_response = cut
        try:
            yield
        finally:
            ppo_trainer.truncate_response = own

    def _train(self, resume_from_checkpoint: str | None) -> None:
        if resume_from_checkpoint is None:
            super().train()
            return
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise fail(
                "a PPO run under FSDP or DeepSpeed cannot be resumed: its critic is in pieces",
                where=resume_from_checkpoint,
                remedy="start it anew with --overwrite true, or train with recipes/rloo.py, which can",
            )
        total = self.args.num_total_batches
        resume = _Resume(self, Path(resume_from_checkpoint))
        self.callback_handler.callbacks.insert(0, resume)
        try:
            super().train()
        finally:
            self.callback_handler.callbacks.remove(resume)
            self.args.num_total_batches = total

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the policy without the critic, out of what DistributedDataParallel has wrapped it in."""
        with self._unwrapped():
            super().save_model(output_dir, _internal_call)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save a checkpoint with the critic; the trainer's state, which makes it whole, comes last."""
        folder = Path(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            save_file(_trained(self.value_model), folder / CRITIC_FILE)
            (folder / _PROGRESS_FILE).write_text(json.dumps({"kl_coef": self.args.kl_coef}), encoding="utf-8")
        with self._unwrapped():
            super()._save_checkpoint(model, trial)

    @contextmanager
    def _unwrapped(self) -> Iterator[None]:
        """Let TRL find `.policy` and `.config`, which it looks for on the wrapper; that has neither."""
        wrapped = self.model
        if isinstance(wrapped, DistributedDataParallel):
            self.model = wrapped.module
        try:
            yield
        finally:
            self.model = wrapped


class AdaptiveKL(TrainerCallback):
    """Moves the KL coefficient so that the KL to the SFT model comes to a target.

        e = clip((KL − target)/target, −0.2, 0.2),   β ← β·(1 + e·n/horizon),   n episodes a step

    (Ziegler et al., Fine-Tuning Language Models from Human Preferences, 2019, section 2.2.)
    """

    def __init__(self, target: float, horizon: int) -> None:
        """Aim at `target` nats, at a pace given by `horizon` episodes."""
        self._target = target
        self._horizon = horizon

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Adapt to the KL that was measured; the log gets the coefficient that made it."""
        kl = (logs or {}).get("objective/kl")
        if kl is None or logs is None:
            return
        settings: Any = args
        logs["objective/kl_coef"] = settings.kl_coef
        error = min(max((kl - self._target) / self._target, -0.2), 0.2)
        settings.kl_coef *= 1 + error * settings.batch_size / self._horizon


class _Continued:
    """A data loader that can be told how many batches were taken already."""

    def __init__(self, loader: Any, seed: int) -> None:
        self._loader = loader
        self._begun: Iterator[Any] | None = None
        sampler = loader.get_sampler()
        if getattr(sampler, "generator", self) is None:
            # Shuffled by random numbers of its own: the global ones are not the same again when a run is resumed.
            sampler.generator = torch.Generator().manual_seed(seed)

    def skip(self, batches: int) -> None:
        """Take that many batches now, whole epochs of them included."""
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
    """Puts everything back as it was, after PPOTrainer has reset its counters and before it takes its first batch."""

    def __init__(self, trainer: ResumablePPOTrainer, folder: Path) -> None:
        self._trainer = trainer
        self._folder = folder

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Load policy, critic, optimizer and schedule, leave out the batches that were used, and only then, since all
        that draws random numbers, restore the random states.
        """
        trainer, folder = self._trainer, self._folder
        settings: Any = args
        progress = json.loads((folder / _PROGRESS_FILE).read_text(encoding="utf-8"))
        saved: Any = type(state).load_from_json(str(folder / "trainer_state.json"))
        _load_policy(trainer.policy_model, folder)
        _load_critic(trainer.value_model, folder / CRITIC_FILE)
        states: dict[str, Any] = {"optimizer.pt": trainer.optimizer, "scheduler.pt": trainer.lr_scheduler}
        for file, part in states.items():
            part.load_state_dict(torch.load(folder / file, map_location="cpu", weights_only=True))
        trainer.dataloader.skip(saved.global_step)
        counters: Any = state
        counters.global_step, counters.episode = saved.global_step, saved.episode
        counters.log_history, settings.kl_coef = saved.log_history, progress["kl_coef"]
        # The loop counts from 1 to this number.
        settings.num_total_batches -= saved.global_step
        trainer._load_rng_state(str(folder))


def _load_policy(policy: Any, folder: Path) -> None:
    if (folder / ADAPTER_FILE).is_file():
        set_peft_model_state_dict(policy, load_file(folder / ADAPTER_FILE))
    else:
        load_checkpoint_in_model(policy, str(folder))


def _load_critic(critic: nn.Module, file: Path) -> None:
    """Put back the parameters that are trained, all of them; the others are the base's."""
    saved = load_file(file)
    if saved.keys() != _trained(critic).keys():
        raise fail("the checkpoint's critic is another one", where=str(file), remedy="start anew with --overwrite true")
    critic.load_state_dict(saved, strict=False)


def _trained(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the parameters that training changes."""
    return {name: weight.detach().contiguous() for name, weight in model.named_parameters() if weight.requires_grad}

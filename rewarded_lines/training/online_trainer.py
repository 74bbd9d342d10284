"""TRL's trainers that generate while they train, with the prompts and ends of responses that measuring uses."""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler
from transformers import TrainerCallback, TrainerControl, TrainerState
from trl import GRPOConfig, GRPOTrainer, RLOOTrainer
from trl.trainer import utils as trl_utils

from rewarded_lines.data.prompts import Prompt, encode
from rewarded_lines.engines.responses import ResponseReader
from rewarded_lines.errors import Problem, UserError, fail
from rewarded_lines.training.moving_reference import MovingReference

# TRL refuses other values only when it has sampled the first responses.
_CHOICES = {
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
    "scale_rewards": ("group", "batch", "none"),
}


def check_standardization(training: GRPOConfig, given: Collection[str]) -> None:
    """Refuse unknown ways to standardize rewards, and one that has no effect; `given` are the keys that are set."""
    problems = [
        Problem("unknown value", where=name, expected=f"one of {', '.join(known)}", got=str(value))
        for name, known in _CHOICES.items()
        if (value := getattr(training, name)) not in known
    ]
    if training.multi_objective_aggregation == "normalize_then_sum" and "scale_rewards" in given:
        problems.append(
            Problem(
                "`normalize_then_sum` always divides by the deviation of the group, then of the batch",
                where="scale_rewards",
                remedy="leave it out, or set `multi_objective_aggregation: sum_then_normalize`",
            )
        )
    if problems:
        raise UserError(problems)


def packed(prompt: Prompt) -> str:
    """Return a prompt as text, a chat as JSON: Arrow would give every turn the keys of all others."""
    return prompt if isinstance(prompt, str) else json.dumps(prompt)


class _EpochSampler(Sampler[int]):
    """TRL's order of prompts, with a seed of its own in every epoch, so that a resumed run can begin in any epoch."""

    def __init__(self, order: Any, trainer: Any) -> None:
        self._order, self._trainer = order, trainer

    def __iter__(self) -> Iterator[int]:
        if self._order.shuffle:
            self._order.generator.manual_seed(self._order.seed + int(self._trainer.state.epoch or 0))
        return iter(self._order)

    def __len__(self) -> int:
        return len(self._order)


def token_places(attention_mask: Tensor) -> Tensor:
    """Return the position of each token in its text; padding on the left does not count."""
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


def _place_tokens(model: Any) -> None:
    """Make a causal language model count positions from a text's first token: TRL's batches are padded on the left."""
    body = model.base_model
    if "position_ids" not in inspect.signature(type(body).forward).parameters:
        return

    def place(module: Any, given: Any, named: dict[str, Any]) -> Any:
        # Generation passes positions itself.
        if named.get("position_ids") is None and named.get("use_cache") is False:
            named = {**named, "position_ids": token_places(named["attention_mask"])}
        return given, named

    body.register_forward_pre_hook(place, with_kwargs=True)


def _skip_padding_on_cpu() -> None:
    """Let TRL's language model head leave out padding and prompts on a CPU, as it does on a GPU.

    On the demo's models, half of an update was the head's work on tokens that no loss reads.
    """
    own = getattr(trl_utils, "_use_triton", None)
    if own is not None and not hasattr(own, "also_cpu"):

        def use(device: torch.device) -> bool:
            return device.type == "cpu" or bool(own(device))

        use.also_cpu = True  # type: ignore[attr-defined]
        trl_utils._use_triton = use


def check_prompts(settings: Any, prompts: int) -> None:
    """Refuse a `GRPOConfig` or `RLOOConfig` whose update needs more prompts than there are.

    TRL would train on none, and save the model that it began with.
    """
    needed = settings.generation_batch_size // settings.num_generations
    if needed > prompts:
        raise fail(
            "an update needs more prompts than there are",
            where="training prompts",
            expected=f"{needed} or more",
            got=str(prompts),
            remedy="lower `per_device_train_batch_size` or `effective_batch_size`, or raise `num_generations`",
        )


class OnlineTrainer(MovingReference):
    """What RLOOTrainer, GRPOTrainer and trainers made of them lack; a class names it before TRL's.

    TRL reads chats with its own template, knows no stop texts and takes end tokens from the model alone. It counts
    padding on the left as positions of the text.

    Checkpoints are written between two rounds of sampling, and every epoch has its own order of prompts. So a resumed
    run has the numbers of an uninterrupted one.

    A response without a score (NaN from every reward function) has advantage 0, and the others of its group are
    compared without it. So TRL does it; a KL penalty in the loss (GRPO's `beta`) still holds its tokens.

    Attributes:
        responses: how many this start trained on.
        unscored: how many of them had no score.
    """

    _metrics: Any
    accelerator: Any
    add_callback: Any
    model: Any
    ref_model: Any

    def __init__(self, *, args: Any, reader: ResponseReader, chats: bool, **parts: Any) -> None:
        """Build TRL's trainer with `parts`; `chats` means that prompts are `packed` chats."""
        check_prompts(args, len(parts["train_dataset"]))
        self.reader, self.chats = reader, chats
        _skip_padding_on_cpu()
        name = "stop_token_ids" if args.use_vllm else "eos_token_id"
        given: Any = args.generation_kwargs or {}
        args.generation_kwargs = {name: sorted(reader.ends), **given}
        if args.use_vllm and args.vllm_max_model_length is None:
            # TRL would reserve memory for all positions of the model: 131,072 of them for some.
            args.vllm_max_model_length = self._longest(parts["train_dataset"]["prompt"]) + args.max_completion_length
        trl: Any = super()
        trl.__init__(args=args, **parts)
        for part in (self.model, self.ref_model):
            if part is not None:
                whole = self.accelerator.unwrap_model(part)
                _place_tokens(getattr(whole, "get_base_model", lambda whole=whole: whole)())
        self.add_callback(_WholeRounds(self))
        # TRL compares a response's last token with these.
        self.eos_token_ids = sorted(reader.ends)
        self.responses = self.unscored = 0
        # It shows such a row at every step, and calls it a fault. Here it is none, and it is counted.
        logging.getLogger(trl._calculate_rewards.__module__).addFilter(_not_about_none)

    def _longest(self, prompts: Sequence[str]) -> int:
        """Return the tokens of the longest prompt."""
        return max(map(len, self._tokenize_prompts(list(prompts))[0]))

    def _get_train_sampler(self, dataset: Any = None) -> Sampler[int]:
        trl: Any = super()
        return _EpochSampler(trl._get_train_sampler(dataset), self)

    def _calculate_rewards(self, *inputs: Any) -> torch.Tensor:
        trl: Any = super()
        rewards: torch.Tensor = trl._calculate_rewards(*inputs)
        without = int(rewards.isnan().all(dim=1).sum())
        if self.model.training:
            self.responses, self.unscored = self.responses + len(rewards), self.unscored + without
        if without:
            # One number, since TRL logs the mean of a list.
            logged = self._metrics["train" if self.model.training else "eval"]
            logged["unscored"] = [sum(logged["unscored"]) + without]
        return rewards

    def _tokenize_prompts(self, prompts: list[str]) -> tuple[list[list[int]], None, dict[str, Any]]:
        own: list[Prompt] = [json.loads(prompt) for prompt in prompts] if self.chats else list(prompts)
        return encode(self.reader.tokenizer, own), None, {}

    def _generate_single_turn(self, prompt_ids: list[list[int]], *rest: Any) -> Any:
        """Return the completions; GRPOTrainer's also have the log probabilities that vLLM found, or None."""
        trl: Any = super()
        made = trl._generate_single_turn(prompt_ids, *rest)
        completions, logps = made if isinstance(made, tuple) else (made, None)
        cut = [list(self.reader.cut(head, row)[0]) for head, row in zip(prompt_ids, completions, strict=True)]
        if logps is not None:
            logps = [row[: len(ids)] for row, ids in zip(logps, cut, strict=True)]
        return (cut, logps) if isinstance(made, tuple) else cut


class ReadRLOOTrainer(OnlineTrainer, RLOOTrainer):  # type: ignore[misc]
    """RLOOTrainer with the ends and prompts of an `OnlineTrainer`.

    Over the n responses of a group that have a score, A_k = r_k − Σ_(j ≠ k) r_j / (n − 1), 0 if n < 2.
    """


class ReadGRPOTrainer(OnlineTrainer, GRPOTrainer):  # type: ignore[misc]
    """GRPOTrainer with the ends and prompts of an `OnlineTrainer`.

    With rewards r_i, their weights w_i, means and deviations over a response's group or over the whole batch,
    leaving out responses without a score, and ε = 1e-4:

        sum_then_normalize:  R = Σ w_i·r_i,   A = (R − mean_group R) / (deviation R + ε)
        normalize_then_sum:  R = Σ w_i·(r_i − mean_group r_i) / (deviation_group r_i + ε),
                             A = (R − mean_batch R) / (deviation_batch R + ε)

    `scale_rewards` chooses the deviation of the first: of the group, of the batch, or `none` for no division.
    """


class _WholeRounds(TrainerCallback):
    """Puts a checkpoint off until the sampled responses are used up: the trainer would lose them.

    `num_iterations` and `steps_per_generation` make one round of sampling last for several updates.
    """

    def __init__(self, trainer: Any) -> None:
        """Take the trainer, which counts its batches."""
        self._trainer, self._due = trainer, False

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Decide whether a checkpoint is written after this update."""
        used_up = self._trainer._step % (args.steps_per_generation * self._trainer.num_iterations) == 0
        self._due |= control.should_save
        control.should_save = self._due and (used_up or control.should_training_stop)
        self._due &= not control.should_save

    on_epoch_end = on_step_end


def _not_about_none(record: logging.LogRecord) -> bool:
    return "All reward functions returned None" not in record.getMessage()

"""TRL's RLOOTrainer with the prompts and end tokens that measuring uses."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection
from typing import Any

import torch
from trl import RLOOConfig, RLOOTrainer

from rewarded_lines.data.prompts import Prompt, encode
from rewarded_lines.engines.responses import ResponseReader
from rewarded_lines.errors import fail


def packed(prompt: Prompt) -> str:
    """Return a prompt as text, a chat as JSON: Arrow would give every turn the keys of all others."""
    return prompt if isinstance(prompt, str) else json.dumps(prompt)


class ReadRLOOTrainer(RLOOTrainer):  # type: ignore[misc]
    """RLOOTrainer whose responses end where a `ResponseReader` ends them.

    TRL knows one end token, the tokenizer's. Chat models have several, in their generation config.

    A response without a score (NaN) is left out, by TRL: its advantage is 0, and the others of its group are compared
    without it, A_k = r_k − Σ_(j ≠ k) r_j / (n − 1) over the n that have a score, 0 if n < 2.

    Attributes:
        responses: how many this start trained on.
        unscored: how many of them had no score.
    """

    def __init__(self, *, args: RLOOConfig, reader: ResponseReader, chats: bool, **parts: Any) -> None:
        """Build TRL's trainer with `parts`; `chats` means that prompts are `packed` chats."""
        if args.mask_truncated_completions and reader.stop:
            raise fail(
                "the trainer takes a response that ends at a stop text for a truncated one",
                where="mask_truncated_completions",
                remedy="set it to false, or leave `stop:` out of the project's `generation:`",
            )
        name = "stop_token_ids" if args.use_vllm else "eos_token_id"
        given: Any = args.generation_kwargs or {}
        args.generation_kwargs = {name: sorted(reader.ends), **given}
        super().__init__(args=args, **parts)
        self._reader, self._chats = reader, chats
        self._tokenizer = _ManyEnds(self._tokenizer, reader.ends)
        self.responses = self.unscored = 0
        # It shows such a row at every step, and calls it a fault. Here it is none, and it is counted.
        logging.getLogger(RLOOTrainer.__module__).addFilter(_not_about_none)

    def _calculate_rewards(self, *inputs: Any) -> torch.Tensor:
        rewards: torch.Tensor = super()._calculate_rewards(*inputs)
        without = int(rewards.isnan().all(dim=1).sum())
        model: Any = self.model
        if model.training:
            self.responses, self.unscored = self.responses + len(rewards), self.unscored + without
        if without:
            # One number, since TRL logs the mean of a list.
            logged = self._metrics["train" if model.training else "eval"]
            logged["unscored"] = [sum(logged["unscored"]) + without]
        return rewards

    def _tokenize_prompts(self, prompts: list[str]) -> tuple[list[list[int]], None, dict[str, Any]]:
        own: list[Prompt] = [json.loads(prompt) for prompt in prompts] if self._chats else list(prompts)
        return encode(self._reader.tokenizer, own), None, {}

    def _generate_single_turn(self, prompt_ids: list[list[int]], *rest: Any) -> list[list[int]]:
        completions = super()._generate_single_turn(prompt_ids, *rest)
        # TRL's own vLLM returns several responses to each prompt, one after another.
        times = len(completions) // len(prompt_ids)
        heads = [ids for ids in prompt_ids for _ in range(times)]
        return [list(self._reader.cut(head, row)[0]) for head, row in zip(heads, completions, strict=True)]


def _not_about_none(record: logging.LogRecord) -> bool:
    return "All reward functions returned None" not in record.getMessage()


class _ManyEnds:
    """A tokenizer whose end token, which TRL compares with a response's last one, equals several ids."""

    def __init__(self, tokenizer: Any, ends: Collection[int]) -> None:
        self._held = tokenizer
        self.eos_token_id = _AnyOf(tokenizer.eos_token_id, ends)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._held, name)


class _AnyOf(int):
    """A number that equals several."""

    _ends: frozenset[int]

    def __new__(cls, value: int | None, ends: Collection[int]) -> _AnyOf:
        made = super().__new__(cls, min(ends) if value is None else value)
        made._ends = frozenset(ends)
        return made

    def __eq__(self, other: object) -> bool:
        return int(self) == other or other in self._ends

    __hash__ = int.__hash__

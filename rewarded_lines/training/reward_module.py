"""Any `Reward` as the `nn.Module` that TRL's PPOTrainer wants for a reward model.

TRL calls `getattr(model, model.base_model_prefix)(input_ids=..., attention_mask=...)` and then
`model.score(hidden states)`. Here the backbone decodes the ids, asks the reward, and hands each row's score
back as its hidden state at every position; `score` passes it on.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutput

from rewarded_lines.errors import fail
from rewarded_lines.evaluation.prompts import split_text
from rewarded_lines.evaluation.rewards import Reward


class RewardModule(nn.Module):
    """A reward, seen by PPOTrainer as a classifier of token ids.

    Every row is a prompt padded on the left to `context_length` tokens, then the response, padded on the
    right. TRL takes the width of its batch for the length of the context, so where the response starts is
    known here only if that width is the same in every batch: see `pad_prompts`, which makes it so.
    """

    base_model_prefix = "backbone"

    def __init__(self, reward: Reward, tokenizer: PreTrainedTokenizerBase, context_length: int) -> None:
        """Present `reward` to PPO.

        Args:
            reward: scores (prompt, response) texts.
            tokenizer: the policy's, which made the ids.
            context_length: tokens of every padded prompt.
        """
        super().__init__()
        self.backbone = _Backbone(reward, tokenizer, context_length)
        self.score = nn.Identity()


class _Backbone(nn.Module):
    def __init__(self, reward: Reward, tokenizer: PreTrainedTokenizerBase, context_length: int) -> None:
        super().__init__()
        self._reward = reward
        self._tokenizer = tokenizer
        self._context_length = context_length

    @torch.no_grad()
    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> BaseModelOutput:
        """Return each row's score as a hidden state of width 1, the same at every position."""
        pairs = [
            split_text(row[mask].tolist(), int(mask[: self._context_length].sum()), self._tokenizer)
            for row, mask in zip(input_ids.cpu(), attention_mask.bool().cpu(), strict=True)
        ]
        scores = self._reward.score([prompt for prompt, _ in pairs], [response for _, response in pairs])
        column = torch.tensor(scores, dtype=torch.float32, device=input_ids.device)
        states = column[:, None, None].expand(*input_ids.shape, 1)
        return BaseModelOutput(hidden_states=(cast(torch.FloatTensor, states),))


def pad_prompts(prompts: list[str], tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> tuple[list[list[int]], int]:
    """Return the prompts as ids, all padded on the left to one length, and that length.

    Prompts of more than `max_tokens` tokens are left out: cut short they would ask something else.
    """
    ids = [row for row in tokenizer(prompts)["input_ids"] if len(row) <= max_tokens]
    length = max(map(len, ids), default=0)
    return [[tokenizer.pad_token_id] * (length - len(row)) + row for row in ids], length


class StandardizedReward:
    """A reward in units of its own spread on the SFT model: (score − mean) / standard deviation.

    PPO's step size, KL coefficient and value loss then mean the same for every reward, whatever its unit
    (Ziegler et al., Fine-Tuning Language Models from Human Preferences, 2019, section 2.1.1). Records keep
    the reward's own unit.
    """

    def __init__(self, reward: Reward, scores: Sequence[float]) -> None:
        """Standardize `reward` by the `scores` of the SFT model's responses.

        Raises:
            UserError: all scores are equal, so there is nothing to learn from.
        """
        self.name = reward.name
        self.unit = "standard deviations of the SFT model"
        self.mean = statistics.fmean(scores)
        self.deviation = statistics.pstdev(scores)
        self._reward = reward
        if not self.deviation > 0:
            raise fail(
                "every response of the SFT model gets the same score",
                where=f"reward `{reward.name}`",
                expected="scores that differ between responses",
                got=str(self.mean),
            )

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        """Return the standardized scores; see `Reward.score`."""
        return [(score - self.mean) / self.deviation for score in self._reward.score(prompts, responses)]

"""Any reward as the `nn.Module` that TRL's PPOTrainer wants for a reward model.

TRL calls `getattr(model, model.base_model_prefix)(input_ids=..., attention_mask=...)` and then
`model.score(hidden states)`. Here the backbone decodes the ids, asks the reward, and hands each row's score
back as its hidden state at every position; `score` passes it on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutput

from rewarded_lines.data.prompts import Prompt, encode, split_text
from rewarded_lines.errors import fail


class Scorer(Protocol):
    """What gives scores to prompts and responses: `WeightedReward`, for one."""

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        """Return one score for each pair."""
        ...


@dataclass(frozen=True)
class Queries:
    """Prompts as PPO takes them: token ids, all padded on the left to `length`.

    TRL takes the width of its batch for the length of the context, so where the response starts is known only if that
    width is the same in every batch.
    """

    prompts: list[Prompt]
    ids: list[list[int]]
    length: int

    def padded(self, pad_token_id: int) -> list[list[int]]:
        """Return the ids, padded."""
        return [[pad_token_id] * (self.length - len(row)) + row for row in self.ids]


def make_queries(prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> Queries:
    """Return the prompts as queries; those of more than `max_tokens` tokens are left out, as they would ask something
    else if they were cut short.

    Raises:
        UserError: every prompt is too long.
    """
    pairs = zip(prompts, encode(tokenizer, prompts), strict=True)
    kept = [(prompt, ids) for prompt, ids in pairs if 0 < len(ids) <= max_tokens]
    if not kept:
        raise fail(
            "no prompt is short enough",
            where="max_prompt_tokens",
            expected=f"prompts of at most {max_tokens} tokens",
            remedy="raise `max_prompt_tokens`",
        )
    return Queries([prompt for prompt, _ in kept], [ids for _, ids in kept], max(len(ids) for _, ids in kept))


class RewardModule(nn.Module):
    """A reward, seen by PPOTrainer as a classifier of token ids.

    Every row is a query, padded on the left, then the response, padded on the right. The reward is given the prompt as
    the data has it, not as its tokens decode, and the response as the evaluator decodes it.
    """

    base_model_prefix = "backbone"

    def __init__(self, reward: Scorer, tokenizer: PreTrainedTokenizerBase, queries: Queries) -> None:
        """Present `reward` to PPO.

        Args:
            reward: scores (prompt, response).
            tokenizer: the policy's, which made the ids.
            queries: every prompt that can come.
        """
        super().__init__()
        self.backbone = _Backbone(reward, tokenizer, queries)
        self.score = nn.Identity()


class _Backbone(nn.Module):
    def __init__(self, reward: Scorer, tokenizer: PreTrainedTokenizerBase, queries: Queries) -> None:
        super().__init__()
        self._reward = reward
        self._tokenizer = tokenizer
        self._length = queries.length
        self._prompts = {tuple(ids): prompt for ids, prompt in zip(queries.ids, queries.prompts, strict=True)}

    @torch.no_grad()
    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> BaseModelOutput:
        """Return each row's score as a hidden state of width 1, the same at every position."""
        prompts, responses = [], []
        for row, mask in zip(input_ids.cpu(), attention_mask.bool().cpu(), strict=True):
            count = int(mask[: self._length].sum())
            ids = row[mask].tolist()
            prompts.append(self._prompts[tuple(ids[:count])])
            responses.append(split_text(ids, count, self._tokenizer)[1])
        column = torch.tensor(self._reward.score(prompts, responses), dtype=torch.float32, device=input_ids.device)
        states = column[:, None, None].expand(*input_ids.shape, 1)
        return BaseModelOutput(hidden_states=(cast(torch.FloatTensor, states),))

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

from rewarded_lines.data.prompts import Prompt, encode
from rewarded_lines.engines.responses import ResponseReader


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


def make_queries(prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase) -> Queries:
    """Return the prompts as queries."""
    ids = encode(tokenizer, prompts)
    return Queries(list(prompts), ids, max(map(len, ids)))


class RewardModule(nn.Module):
    """A reward, seen by PPOTrainer as a classifier of token ids.

    Every row is a query, padded on the left, then the response, padded on the right. The reward is given the prompt as
    the data has it, not as its tokens decode, and the response as the evaluator reads it.
    """

    base_model_prefix = "backbone"

    def __init__(
        self, reward: Scorer, reader: ResponseReader, queries: Queries, missing_eos_penalty: float | None = None
    ) -> None:
        """Present `reward` to PPO.

        Args:
            reward: scores (prompt, response).
            reader: of the policy's responses.
            queries: every prompt that can come.
            missing_eos_penalty: taken off the score of a response that does not end.
        """
        super().__init__()
        self.backbone = _Backbone(reward, reader, queries, missing_eos_penalty or 0.0)
        self.score = nn.Identity()


class _Backbone(nn.Module):
    def __init__(self, reward: Scorer, reader: ResponseReader, queries: Queries, penalty: float) -> None:
        super().__init__()
        self._reward = reward
        self._reader = reader
        self._penalty = penalty
        self._length = queries.length
        self._prompts = {tuple(ids): prompt for ids, prompt in zip(queries.ids, queries.prompts, strict=True)}

    @torch.no_grad()
    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> BaseModelOutput:
        """Return each row's score as a hidden state of width 1, the same at every position."""
        prompts, responses, open_ended = [], [], []
        for row, mask in zip(input_ids.cpu(), attention_mask.bool().cpu(), strict=True):
            count = int(mask[: self._length].sum())
            ids = row[mask].tolist()
            prompts.append(self._prompts[tuple(ids[:count])])
            response = self._reader.read(ids[:count], ids[count:])
            responses.append(response.judged)
            open_ended.append(not response.ended)
        column = torch.tensor(self._reward.score(prompts, responses), dtype=torch.float32, device=input_ids.device)
        column[torch.tensor(open_ended, device=input_ids.device)] -= self._penalty
        states = column[:, None, None].expand(*input_ids.shape, 1)
        return BaseModelOutput(hidden_states=(cast(torch.FloatTensor, states),))

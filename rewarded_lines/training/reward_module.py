"""Any reward as the `nn.Module` that TRL's PPOTrainer takes for a reward model.

TRL calls `getattr(model, model.base_model_prefix)(input_ids=..., attention_mask=...)`, then
`model.score(hidden states)`. Here the backbone is a method that decodes the ids and returns
each row's score as its hidden state at every position; `score` is the identity.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutput

from rewarded_lines.data.prompts import Prompt, encode
from rewarded_lines.engines.responses import ResponseReader
from rewarded_lines.training.training_reward import WeightedReward


@dataclass(frozen=True)
class Queries:
    """Prompts as token ids, all padded on the left to `length`.

    TRL takes the width of a batch as the length of its prompts, so all batches need the same width.
    """

    prompts: list[Prompt]
    ids: list[list[int]]
    length: int

    def padded(self, pad_token_id: int) -> list[list[int]]:
        """Return the padded ids."""
        return [[pad_token_id] * (self.length - len(row)) + row for row in self.ids]


def make_queries(prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase) -> Queries:
    """Return the prompts as queries."""
    ids = encode(tokenizer, prompts)
    return Queries(list(prompts), ids, max(map(len, ids)))


class RewardModule(nn.Module):
    """A reward in the form of a classifier of token ids.

    A row is a query, padded on the left, then a response, padded on the right. The reward gets the original
    prompt, not its decoded tokens, and the response as the evaluator reads it.
    """

    base_model_prefix = "backbone"

    def __init__(
        self,
        reward: WeightedReward,
        reader: ResponseReader,
        queries: Queries,
        missing_eos_penalty: float | None = None,
    ) -> None:
        """Wrap `reward`; `queries` holds all prompts of the training.

        `missing_eos_penalty` is subtracted from the score of a response that does not end.
        """
        super().__init__()
        self.score = nn.Identity()
        self._reward, self._reader = reward, reader
        self._penalty, self._length = missing_eos_penalty or 0.0, queries.length
        self._prompts = {tuple(ids): prompt for ids, prompt in zip(queries.ids, queries.prompts, strict=True)}

    @torch.no_grad()
    def backbone(self, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> BaseModelOutput:
        """Return each row's score as a hidden state of width 1, the same at every position."""
        prompts, responses = [], []
        for row, mask in zip(input_ids.cpu(), attention_mask.bool().cpu(), strict=True):
            count = int(mask[: self._length].sum())
            ids = row[mask].tolist()
            prompts.append(self._prompts[tuple(ids[:count])])
            responses.append(self._reader.read(ids[:count], ids[count:]))
        scores = self._reward.score(prompts, [response.judged for response in responses])
        column = torch.tensor(scores, dtype=torch.float32, device=input_ids.device)
        unended = [not response.ended for response in responses]
        column[torch.tensor(unended, device=column.device)] -= self._penalty
        states = column[:, None, None].expand(*input_ids.shape, 1)
        return BaseModelOutput(hidden_states=(cast(torch.FloatTensor, states),))

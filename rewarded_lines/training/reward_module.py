"""Any reward as the `nn.Module` that TRL's PPOTrainer takes for a reward model.

TRL calls `getattr(model, model.base_model_prefix)(input_ids=..., attention_mask=...)`, then
`model.score(hidden states)`. Here the backbone is a method that decodes the ids and returns
each row's score as its hidden state at every position; `score` is the identity.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from rewarded_lines.data.prompts import Prompt, encode
from rewarded_lines.data.rows import COLUMNS, Row
from rewarded_lines.engines.responses import ResponseReader
from rewarded_lines.errors import fail
from rewarded_lines.rewards.reward import deciding
from rewarded_lines.training.training_reward import WeightedReward, score_tokens

# The key of a row for the columns that a reward reads.
_READ = "read"


def refuse_unscored(reward: WeightedReward, scores: Sequence[float], prompts: Sequence[Prompt]) -> None:
    """Refuse a response without a score: PPO's update cannot leave it out."""
    if not all(map(math.isfinite, scores)):
        index = next(index for index, score in enumerate(scores) if not math.isfinite(score))
        raise fail(
            "PPO needs a score for every response, and the reward abstained",
            where=f"reward `{reward.name}`",
            expected="a number",
            got=f"None for a response to {prompts[index]!r}",
            remedy="train with recipes/rloo.py, which leaves such rows out",
        )


class RewardModule(nn.Module):
    """A reward in the form of a classifier of token ids.

    A row is a prompt, padded on the left, then a response, padded on the right. The reward gets the original
    prompt, not its decoded tokens, and the response as the evaluator reads it.

    Attributes:
        ids: the prompts' tokens.
        length: width of the padded prompts. TRL takes a batch's width for it, so all batches need the same.
    """

    base_model_prefix = "backbone"

    def __init__(
        self, reward: WeightedReward, reader: ResponseReader, rows: Sequence[Row], penalty: float | None = None
    ) -> None:
        """Wrap `reward` for all prompts of the training; for `penalty` see `score_tokens`.

        Raises:
            UserError: two rows have the same prompt, but not the same columns for a reward: TRL passes prompts only.
        """
        super().__init__()
        self.score = nn.Identity()
        self._reward, self._reader, self._penalty = reward, reader, penalty
        self.ids = encode(reader.tokenizer, [row["prompt"] for row in rows])
        self.length = max(map(len, self.ids))
        self._rows: dict[tuple[int, ...], Row] = {}
        for ids, row, read in zip(self.ids, rows, deciding(rows, reward.rewards.values()), strict=True):
            first = self._rows.setdefault(tuple(ids), {**row, _READ: read.get(COLUMNS)})
            if first[_READ] != read.get(COLUMNS):
                raise fail(
                    "PPO cannot tell two rows with one prompt apart, and a reward reads their columns",
                    where="training rows",
                    expected="each prompt once, or with the same columns each time",
                    got=f"{first[_READ]} and {read.get(COLUMNS)} for {str(row['prompt'])[:120]!r}",
                    remedy="leave one of them out, or train with recipes/rloo.py, which tells them apart",
                )

    def padded(self, pad_token_id: int) -> list[list[int]]:
        """Return the prompts' tokens, all padded on the left to `length`."""
        return [[pad_token_id] * (self.length - len(row)) + row for row in self.ids]

    @torch.no_grad()
    def backbone(self, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> BaseModelOutput:
        """Return each row's score as a hidden state of width 1, the same at every position."""
        heads, tails = [], []
        for row, mask in zip(input_ids.cpu(), attention_mask.bool().cpu(), strict=True):
            count, ids = int(mask[: self.length].sum()), row[mask].tolist()
            heads.append(ids[:count])
            tails.append(ids[count:])
        rows = [self._rows[tuple(ids)] for ids in heads]
        scores = score_tokens(self._reward, self._reader, rows, heads, tails, self._penalty)
        refuse_unscored(self._reward, scores, [row["prompt"] for row in rows])
        column = torch.tensor(scores, dtype=torch.float32, device=input_ids.device)
        states = column[:, None, None].expand(*input_ids.shape, 1)
        return BaseModelOutput(hidden_states=(cast(torch.FloatTensor, states),))

"""The project's rewards as the functions that TRL's online trainers call: one for each, and one for a missing end."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from rewarded_lines.data.prompts import encode
from rewarded_lines.data.rows import Row
from rewarded_lines.engines.responses import ResponseReader
from rewarded_lines.rewards.reward import columns_of
from rewarded_lines.training.training_reward import WeightedReward

PENALTY = "missing_eos_penalty"


class RewardFunctions:
    """Every reward of a weighted sum as a function of its own; TRL sums them with the `weights`, leaving NaN out.

        R(x, y) = Σ wᵢ·(rᵢ(x, y) − mᵢ)/sᵢ − penalty, the last if y does not end

    The penalty is one more function, −1 where a response does not end, with the penalty as its weight. So a trainer
    that standardizes rewards apart treats it as a reward, too. A response that no reward scores pays none: it has no
    score at all, and is left out.

    Attributes:
        weights: of the functions, TRL's `reward_weights`.
        functions: take the column `row` of the trainer's data set, numbers of `rows`, and token ids of completions.
    """

    def __init__(
        self, reward: WeightedReward, reader: ResponseReader, rows: Sequence[Row], penalty: float | None = None
    ) -> None:
        """Split `reward`; `penalty` is what a response pays that does not end."""
        self._reward, self._reader, self._rows = reward, reader, rows
        names, self.weights = list(reward.weights), list(reward.weights.values())
        if penalty:
            names, self.weights = [*names, PENALTY], [*self.weights, penalty]
        self.functions = [self._function(place, name) for place, name in enumerate(names)]
        self._scored: tuple[Any, list[list[float]]] = (None, [])

    def _function(self, place: int, name: str) -> Callable[..., list[float]]:
        def function(row: Sequence[int], completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
            # TRL calls one function after another with the same list: the first call scores for all.
            if self._scored[0] is not completion_ids:
                self._scored = (completion_ids, self._score(row, completion_ids))
            return self._scored[1][place]

        # TRL logs it by this name.
        function.__name__ = name
        return function

    def _score(self, row: Sequence[int], completion_ids: Sequence[Sequence[int]]) -> list[list[float]]:
        """Return every function's scores; prompts and responses are read as the evaluator reads them."""
        rows = [self._rows[number] for number in row]
        prompts = [one["prompt"] for one in rows]
        heads = encode(self._reader.tokenizer, prompts)
        responses = [self._reader.read(head, ids) for head, ids in zip(heads, completion_ids, strict=True)]
        parts = self._reward.parts(prompts, [response.judged for response in responses], columns_of(rows))
        columns = list(self._reward.standardized(parts).values())
        unscored = [all(map(math.isnan, scores)) for scores in zip(*columns, strict=True)]
        fines = [
            math.nan if none else -float(not response.ended) for none, response in zip(unscored, responses, strict=True)
        ]
        return [*columns, fines]

"""What a policy is trained for: the weighted sum of rewards of the project, in units of their spread on the SFT model.

    R(x, y) = Σ wᵢ·(rᵢ(x, y) − mᵢ)/sᵢ

One reward with weight 1 is a rewarded policy; several are the multi-objective baseline (MORL). mᵢ and sᵢ are mean and
standard deviation on the SFT model's responses (Ziegler et al., Fine-Tuning Language Models from Human Preferences,
2019, section 2.1.1), so that step size, KL coefficient and value loss mean the same for rewards of any unit; without
normalization they are 0 and 1. Records keep each reward's own unit.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rewarded_lines.data.lengths import shorten_prompt
from rewarded_lines.data.prompts import Prompt, encode
from rewarded_lines.engines.responses import ResponseReader
from rewarded_lines.errors import Problem, UserError, fail
from rewarded_lines.projects import Project
from rewarded_lines.rewards.load_rewards import Reward, load_rewards

Scale = tuple[float, float]


class WeightedReward:
    """Σ wᵢ·(rᵢ − mᵢ)/sᵢ; it scores as a `Reward` does."""

    def __init__(self, rewards: Mapping[str, Reward], weights: Mapping[str, float]) -> None:
        """Sum `rewards` as they are, until `standardize` is called.

        Args:
            rewards: by name.
            weights: of each.
        """
        self.rewards = {name: rewards[name] for name in weights}
        self.weights = dict(weights)
        self.scales: dict[str, Scale] = dict.fromkeys(weights, (0.0, 1.0))
        # How many prompts were shortened for each reward model's sake.
        self.shortened = dict.fromkeys(weights, 0)
        # And how many responses could not be read even so.
        self.unread = dict.fromkeys(weights, 0)
        self._lowest: dict[str, float] = {}
        self.name = next(iter(weights)) if list(weights.values()) == [1.0] else "+".join(weights)
        self.unit = next(iter(self.rewards.values())).unit if len(weights) == 1 else ""
        self.fingerprint = "+".join(f"{weights[name]}*{reward.fingerprint}" for name, reward in self.rewards.items())

    def parts(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> dict[str, list[float]]:
        """Return every reward's own scores, in its own unit."""
        return {name: self._scores(name, prompts, responses) for name in self.rewards}

    def _scores(self, name: str, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        """Return one reward's scores; see `_readable` for what does not fit it."""
        reward, asked = self.rewards[name], self._readable(name, prompts, responses)
        read = [(at, prompt) for at, prompt in enumerate(asked) if prompt is not None]
        scores = reward.score([prompt for _, prompt in read], [responses[at] for at, _ in read])
        if len(read) < len(asked):
            lowest = min([*scores, self._lowest.get(name, math.inf)])
            if lowest == math.inf:
                raise fail("no response is short enough for the reward model", where=f"reward `{name}`")
            found = {at: score for (at, _), score in zip(read, scores, strict=True)}
            scores = [found.get(at, lowest) for at in range(len(asked))]
        self._lowest[name] = min([*scores, self._lowest.get(name, math.inf)])
        return scores

    def _readable(self, name: str, prompts: Sequence[Prompt], responses: Sequence[str]) -> Sequence[Prompt | None]:
        """Return the prompts, those shortened that leave a reward model no room for the response.

        Prompts were checked for the longest response before training; by another tokenizer a response may still be
        longer than was reckoned. A run is not lost to that: the prompt gives way, or the response gets the lowest score
        (None). Both are counted and told.
        """
        limit = self.rewards[name].limit
        if limit is None:
            return prompts
        own: list[Prompt | None] = list(prompts)
        for at, length in enumerate(self.rewards[name].lengths(prompts, responses)):
            if length > limit:
                shorter = shorten_prompt(prompts[at], lambda prompt: self._fits(name, prompt, responses[at], limit))  # noqa: B023 - called at once
                own[at] = shorter
                self.shortened[name] += shorter is not None
                self.unread[name] += shorter is None
        return own

    def _fits(self, name: str, prompt: Prompt, response: str, limit: int) -> bool:
        return self.rewards[name].lengths([prompt], [response])[0] <= limit

    def total(self, parts: Mapping[str, Sequence[float]]) -> list[float]:
        """Return the sum for scores that `parts` gave."""
        columns = []
        for name, weight in self.weights.items():
            mean, deviation = self.scales[name]
            columns.append([weight * (score - mean) / deviation for score in parts[name]])
        return [sum(row) for row in zip(*columns, strict=True)]

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        """Return the weighted sum for each pair; see `Reward.score`."""
        return self.total(self.parts(prompts, responses))

    def standardize(self, parts: Mapping[str, Sequence[float]]) -> None:
        """Take mean and deviation of each reward from its scores on the SFT model's responses.

        Raises:
            UserError: all scores of a reward are equal, so there is nothing to learn from.
        """
        for name, scores in parts.items():
            mean, deviation = statistics.fmean(scores), statistics.pstdev(scores)
            if not deviation > 0:
                raise fail(
                    "every response of the SFT model gets the same score",
                    where=f"reward `{name}`",
                    expected="scores that differ between responses",
                    got=str(mean),
                )
            self.scales[name] = (mean, deviation)


def load_training_reward(project: Project, weights: Mapping[str, float], device: str) -> WeightedReward:
    """Return the weighted sum of rewards that the project declares.

    Raises:
        UserError: a reward of the role "audit"; an unknown name, or a reward that cannot be loaded; all faults at once.
    """
    declared = project.config.rewards
    audits = [name for name in weights if name in declared and declared[name].role == "audit"]
    if audits:
        raise UserError(_held_out(name, project) for name in audits)
    return WeightedReward(load_rewards(project, list(weights), device), weights)


def _held_out(name: str, project: Project) -> Problem:
    return Problem(
        "an audit reward cannot be trained on",
        where=project.where("rewards", name),
        expected="a reward of the role objective",
        got="role: audit, which holds it out: what a policy was trained on cannot judge it",
        remedy="train on another reward, or take `role: audit` away",
    )


@dataclass
class RewardFunction:
    """A reward in the form that TRL's RLOOTrainer calls: prompts and the ids of completions in, scores out.

    The response is read as the evaluator reads it, together with its prompt, so both score the same text.

    Attributes:
        reward: what scores.
        reader: of the policy's responses.
        chats: whether prompts are chats, packed as JSON.
        missing_eos_penalty: taken off the score of a response that does not end.
    """

    reward: WeightedReward
    reader: ResponseReader
    chats: bool = False
    missing_eos_penalty: float | None = None
    __name__ = "reward"

    def __call__(self, prompts: Sequence[str], completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        """Return one score for each completion; without an end the penalty is taken off."""
        asked: list[Prompt] = [json.loads(prompt) for prompt in prompts] if self.chats else list(prompts)
        heads = encode(self.reader.tokenizer, asked)
        responses = [self.reader.read(head, ids) for head, ids in zip(heads, completion_ids, strict=True)]
        scores = self.reward.score(asked, [response.judged for response in responses])
        penalty = self.missing_eos_penalty or 0.0
        return [score - (0.0 if response.ended else penalty) for score, response in zip(scores, responses, strict=True)]

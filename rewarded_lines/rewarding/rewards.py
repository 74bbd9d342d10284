"""What a policy is trained for: the weighted sum of rewards of the project, in units of their spread on the SFT model.

    R(x, y) = Σ wᵢ·(rᵢ(x, y) − mᵢ)/sᵢ

One reward with weight 1 is a rewarded policy; several are the multi-objective baseline (MORL). mᵢ and sᵢ are mean and
standard deviation on the SFT model's responses (Ziegler et al., Fine-Tuning Language Models from Human Preferences,
2019, section 2.1.1), so that step size, KL coefficient and value loss mean the same for rewards of any unit; without
normalization they are 0 and 1. Records keep each reward's own unit.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rewarded_lines.data.prompts import Prompt, encode, prompt_text, split_text
from rewarded_lines.errors import Problem, UserError, fail
from rewarded_lines.projects import Project
from rewarded_lines.scoring.rewards import Reward, load_rewards

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
        self.name = next(iter(weights)) if list(weights.values()) == [1.0] else "+".join(weights)
        self.unit = next(iter(self.rewards.values())).unit if len(weights) == 1 else ""
        self.fingerprint = "+".join(f"{weights[name]}*{reward.fingerprint}" for name, reward in self.rewards.items())

    def parts(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> dict[str, list[float]]:
        """Return every reward's own scores, in its own unit."""
        texts = [prompt_text(prompt) for prompt in prompts]
        return {name: reward.score(texts, responses) for name, reward in self.rewards.items()}

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

    The response is decoded as the evaluator decodes it, together with its prompt, so both score the same text.
    """

    reward: WeightedReward
    tokenizer: Any
    missing_eos_penalty: float | None = None
    __name__ = "reward"

    def __call__(self, prompts: Sequence[Prompt], completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        """Return one score for each completion; without an end token the penalty is taken off."""
        rows = zip(encode(self.tokenizer, prompts), completion_ids, strict=True)
        responses = [split_text([*ids, *completion], len(ids), self.tokenizer)[1] for ids, completion in rows]
        scores = self.reward.score(prompts, responses)
        if self.missing_eos_penalty:
            end = self.tokenizer.eos_token_id
            ended = [end in completion for completion in completion_ids]
            scores = [
                score - (0.0 if done else self.missing_eos_penalty) for score, done in zip(scores, ended, strict=True)
            ]
        return scores

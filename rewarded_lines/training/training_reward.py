"""The reward to train for: a weighted sum of the project's rewards, standardized on the SFT model.

    R(x, y) = Σ wᵢ·(rᵢ(x, y) − mᵢ)/sᵢ

One reward with weight 1 makes a policy to merge; several make the multi-objective baseline (MORL). mᵢ and sᵢ
are mean and standard deviation on the SFT model's responses, so hyperparameters mean the same for rewards of any
unit. Without normalization they are 0 and 1. Records keep each reward's own unit.

A reward that abstains on a response (NaN) adds nothing to its sum, as in TRL. A response that no reward scores has no
sum (NaN): training leaves it out. TRL's online trainers call the rewards as functions: one for each, and one for a
missing end.

Source: Ziegler et al., Fine-Tuning Language Models from Human Preferences, 2019, section 2.1.1.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rewarded_lines.data.lengths import shorten_prompt
from rewarded_lines.data.prompts import Prompt, encode
from rewarded_lines.data.rows import Row
from rewarded_lines.engines.responses import ResponseReader
from rewarded_lines.errors import Problem, UserError, fail
from rewarded_lines.judge_settings import SFT_MODEL
from rewarded_lines.projects import Project
from rewarded_lines.rewards.load_rewards import load_rewards
from rewarded_lines.rewards.reward import Columns, Reward, columns_of
from rewarded_lines.training.gains import scored

_ALL_EQUAL = "every response of the SFT model gets the same score"
_LOOK_AT = "check what the reward reads, raise `temperature`, or validate on more prompts (`validation_limit`)"


class WeightedReward:
    """Σ wᵢ·(rᵢ − mᵢ)/sᵢ; it has the `score` of a `Reward`.

    Attributes:
        scales: mᵢ and sᵢ by name; 0 and 1 until `standardize` is called.
        shortened: by name, prompts that were shortened to fit the reward model.
        unread: by name, responses too long to be scored even so.
    """

    def __init__(self, rewards: Mapping[str, Reward], weights: Mapping[str, float]) -> None:
        """Sum `rewards` with `weights`, both by name."""
        self.rewards = {name: rewards[name] for name in weights}
        self.weights = dict(weights)
        self.scales: dict[str, tuple[float, float]] = dict.fromkeys(weights, (0.0, 1.0))
        self.shortened, self.unread = dict.fromkeys(weights, 0), dict.fromkeys(weights, 0)
        self._lowest = dict.fromkeys(weights, math.inf)
        self.name = next(iter(weights)) if list(weights.values()) == [1.0] else "+".join(weights)
        self.fingerprint = "+".join(f"{weights[name]}*{reward.fingerprint}" for name, reward in self.rewards.items())

    def parts(
        self, prompts: Sequence[Prompt], responses: Sequence[str], columns: Columns = None
    ) -> dict[str, list[float]]:
        """Return every reward's own scores, in its own unit, NaN where it abstains.

        `columns` are those of each prompt's row.
        """
        rows = columns or [{}] * len(prompts)
        return {name: self._scores(name, prompts, responses, rows) for name in self.rewards}

    def _scores(
        self, name: str, prompts: Sequence[Prompt], responses: Sequence[str], columns: Sequence[Row]
    ) -> list[float]:
        """Return one reward's scores; a response that it cannot read gets the lowest score so far."""
        fitting = self._readable(name, prompts, responses, columns)
        read = [(at, prompt) for at, prompt in enumerate(fitting) if prompt is not None]
        places = [at for at, _ in read]
        scores = self.rewards[name].score(
            [prompt for _, prompt in read], [responses[at] for at in places], [columns[at] for at in places]
        )
        lowest = self._lowest[name] = min([*scored(scores), self._lowest[name]])
        if len(read) == len(fitting):
            return scores
        if lowest == math.inf:
            raise fail("no response is short enough for the reward model", where=f"reward `{name}`")
        found = {at: score for (at, _), score in zip(read, scores, strict=True)}
        return [found.get(at, lowest) for at in range(len(fitting))]

    def _readable(
        self, name: str, prompts: Sequence[Prompt], responses: Sequence[str], columns: Sequence[Row]
    ) -> Sequence[Prompt | None]:
        """Return the prompts, shortened where prompt and response are too long for a reward model.

        Before training, prompts were checked with an estimate of the longest response in the reward model's
        tokens. A longer one must not stop the run: its prompt is shortened, or becomes None.
        """
        reward = self.rewards[name]
        limit = reward.limit
        if limit is None:
            return prompts
        fitting: list[Prompt | None] = list(prompts)
        for at, length in enumerate(reward.lengths(prompts, responses, columns)):
            if length > limit:

                def fits(prompt: Prompt, response: str = responses[at], row: Row = columns[at]) -> bool:
                    return reward.lengths([prompt], [response], [row])[0] <= limit

                fitting[at] = shorten_prompt(prompts[at], fits)
                counts = self.unread if fitting[at] is None else self.shortened
                counts[name] += 1
        return fitting

    def standardized(self, parts: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
        """Return the scores that `parts` returned as (rᵢ − mᵢ)/sᵢ, by reward."""
        return {
            name: [(score - mean) / deviation for score in parts[name]]
            for name, (mean, deviation) in self.scales.items()
        }

    def total(self, parts: Mapping[str, Sequence[float]]) -> list[float]:
        """Return the weighted sum of the scores that `parts` returned; NaN for a response without any."""
        scores = self.standardized(parts)
        columns = [[weight * score for score in scores[name]] for name, weight in self.weights.items()]
        rows = map(scored, zip(*columns, strict=True))
        return [sum(row) if row else math.nan for row in rows]

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str], columns: Columns = None) -> list[float]:
        """Return the weighted sum for each pair; see `Reward.score`."""
        return self.total(self.parts(prompts, responses, columns))

    def standardize(self, parts: Mapping[str, Sequence[float]]) -> None:
        """Take each reward's mean and deviation from its scores on the SFT model's responses."""
        for name, scores in parts.items():
            there = scored(scores)
            mean, deviation = statistics.fmean(there), statistics.pstdev(there)
            if not deviation > 0:
                raise fail(
                    _ALL_EQUAL,
                    where=f"reward `{name}`",
                    expected="scores that differ between responses",
                    got=str(mean),
                    remedy=f"{_LOOK_AT}; or set `normalize_rewards: false`, if the SFT model never earns it yet",
                )
            self.scales[name] = (mean, deviation)


def tell_all_equal(parts: Mapping[str, Sequence[float]]) -> list[str]:
    """Return a line for each reward that scores all responses alike: training learns nothing until they differ."""
    same = {name: there[0] for name, scores in parts.items() if len(set(there := scored(scores))) == 1}
    return [f"reward `{name}`: {_ALL_EQUAL}, {score:g}; {_LOOK_AT}" for name, score in same.items()]


def load_training_reward(project: Project, weights: Mapping[str, float], device: str) -> WeightedReward:
    """Return the weighted sum of the project's rewards; an audit reward is refused."""
    declared = project.config.rewards
    audits = [name for name in weights if name in declared and declared[name].role == "audit"]
    if audits:
        raise UserError(
            Problem(
                "an audit reward cannot be trained on",
                where=project.where("rewards", name),
                expected="a reward of the role objective",
                got="role: audit; a reward that a policy was trained on cannot judge it",
                remedy="train on another reward, or remove `role: audit`",
            )
            for name in audits
        )
    if against := [name for name in weights if name in declared and declared[name].against == SFT_MODEL]:
        raise fail(
            "a training has no responses of the SFT model to compare with",
            where=project.where("rewards", against[0]),
            got="against: sft",
            remedy="put reference answers into a column of the training rows, and name it: `against: COLUMN`",
        )
    return WeightedReward(load_rewards(project, list(weights), device), weights)


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

"""Rewards: one declaration, a classifier or a Python function, scored alike by recipes and evaluator.

A score is a Python float per (prompt, response) pair, never rounded. Special tokens are the tokenizer's business;
text is never stripped here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from rewarded_lines.config import RewardSpec
from rewarded_lines.data.prompts import Prompt
from rewarded_lines.errors import Problem, UserError, did_you_mean
from rewarded_lines.projects import Project
from rewarded_lines.references import find_function, local_path, looks_local
from rewarded_lines.rewards.classifier_inputs import fill_template
from rewarded_lines.rewards.classifier_rewards import ModelReward
from rewarded_lines.rewards.function_rewards import FunctionReward
from rewarded_lines.rewards.reward_devices import available_memory

__all__ = ["FunctionReward", "ModelReward", "Reward", "fill_template", "load_reward", "load_rewards"]


class Reward(Protocol):
    """Anything that scores responses to prompts; higher is better."""

    name: str
    unit: str
    fingerprint: str
    """A hash of the weights or the source file behind the scores: other scores, other fingerprint."""
    size: int
    """Bytes of its weights; 0 for a function."""
    device: str
    """Where the weights are when they are in memory."""

    @property
    def limit(self) -> int | None:
        """The most tokens of a prompt and response that it reads, if there is an end to it."""
        ...

    def lengths(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[int]:
        """Return how many tokens it reads of each prompt and response."""
        ...

    def check(self, prompts: Sequence[Prompt]) -> str:
        """Return what it will not read of some prompts, as a sentence, or "".

        Raises:
            UserError: it cannot read them right.
        """
        ...

    @property
    def loaded(self) -> bool:
        """Say whether the weights, if there are any, are in memory."""
        ...

    def load(self) -> None:
        """Bring the weights into memory; `score` does so by itself."""
        ...

    def free(self) -> None:
        """Let go of memory and processes; the reward can be used again."""
        ...

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        """Return one finite float per pair; a prompt is a text or the turns of a chat.

        Raises:
            PairError: the reward failed on a pair, or its score is not finite; a `UserError` that names the pair.
            UserError: it failed otherwise.
        """
        ...


def load_rewards(project: Project, names: Sequence[str] = (), device: str = "auto") -> dict[str, Reward]:
    """Return the project's rewards by name, all of them or only `names`, in the order declared.

    Every one is loaded once, since only that shows that it can be. When memory runs short, those before the last
    loaded are freed again; each loads itself when it is asked for scores.

    Raises:
        UserError: an unknown name, or a reward that cannot be loaded; all faults at once.
    """
    declared = project.config.rewards
    problems = [_unknown_reward(name, list(declared), project) for name in names if name not in declared]
    rewards: dict[str, Reward] = {}
    for name, spec in declared.items():
        if names and name not in names:
            continue
        try:
            rewards[name] = load_reward(name, spec, project.root, device)
        except UserError as error:
            problems += error.problems
        else:
            _make_room(rewards)
    if problems:
        free_all(rewards.values())
        raise UserError(problems)
    return rewards


def load_reward(name: str, spec: RewardSpec, root: Path = Path(), device: str = "auto") -> Reward:
    """Return the reward that `spec` declares.

    Args:
        name: how it is called in records and figures.
        spec: its declaration.
        root: the folder that relative paths in `spec` start from.
        device: "auto" (a GPU when there is one), "cpu", "cuda" or "cuda:1"; `device:` of the declaration comes first.

    Raises:
        UserError: the function, the model or the device does not exist, or does not fit the declaration.
    """
    if spec.function is not None:
        function = find_function(spec.function, root, where=f"reward `{name}`")
        return FunctionReward(
            name, spec.unit, function, reference=spec.function, root=root, workers=spec.workers, messages=spec.messages
        )
    assert spec.model is not None
    reference = str(local_path(spec.model, root)) if looks_local(spec.model, root) else spec.model
    return ModelReward(name, spec, reference, device)


def free_all(rewards: Iterable[Reward]) -> None:
    """Free each of `rewards`."""
    for reward in rewards:
        reward.free()


def _make_room(rewards: dict[str, Reward]) -> None:
    """Free the models on a device if the next, which may be as large as any so far, might not fit beside them."""
    last = next(reversed(rewards.values()))
    beside = [reward for reward in rewards.values() if reward.size and reward.device == last.device]
    if last.size and available_memory(last.device) < max(reward.size for reward in beside):
        free_all(beside)


def _unknown_reward(name: str, known: list[str], project: Project) -> Problem:
    return Problem(
        f"no reward `{name}`",
        where=str(project.path),
        expected="one of " + ", ".join(known) if known else "a `rewards:` section",
        remedy=did_you_mean(name, known),
    )

"""Rewards: how a project's rewards are loaded, and the prompts that they can read.

A reward is a classifier, a judge, a Python function or a server. A score is a float per (prompt, response) pair, never
rounded. Texts are never stripped here, and only tokenizers treat special tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rewarded_lines.data.lengths import Limit
from rewarded_lines.data.prompts import Prompt, prompt_text
from rewarded_lines.errors import Problem, UserError, did_you_mean, fail
from rewarded_lines.processes import available_memory
from rewarded_lines.projects import Project
from rewarded_lines.references import local_path, looks_local
from rewarded_lines.reward_settings import RewardSpec
from rewarded_lines.rewards.classifier_rewards import ModelReward, share_classifier
from rewarded_lines.rewards.function_rewards import FunctionReward
from rewarded_lines.rewards.local_judge import LocalJudge
from rewarded_lines.rewards.reward import Reward

# Prompts for the estimate of how many tokens two tokenizers need for one text.
_ESTIMATED_FROM = 200
# The border between prompt and response may need other tokens than each side alone.
_SLACK = 2


def load_rewards(project: Project, names: Sequence[str] = (), device: str = "auto") -> dict[str, Reward]:
    """Return all rewards of a project, or only `names`, in the declared order.

    Every reward is loaded once, to report all faults together. If memory runs short, earlier models are freed; they
    load themselves again for their next score.
    """
    declared = project.config.rewards
    known = "one of " + ", ".join(declared) if declared else "a `rewards:` section"
    problems = [
        Problem(f"no reward `{name}`", str(project.path), known, remedy=did_you_mean(name, declared))
        for name in names
        if name not in declared
    ]
    rewards: dict[str, Reward] = {}
    models: dict[str, Any] = {}
    for name, spec in declared.items():
        if names and name not in names:
            continue
        try:
            rewards[name] = load_reward(name, spec, project.root, device, models)
        except UserError as error:
            problems += error.problems
        else:
            _make_room(rewards)
    if problems:
        free_all(rewards.values())
        raise UserError(problems)
    return rewards


def load_reward(
    name: str,
    spec: RewardSpec,
    root: Path = Path(),
    device: str = "auto",
    models: dict[str, Any] | None = None,
) -> Reward:
    """Return the reward that `spec` declares, with paths relative to `root`.

    The `device` is "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:1"; the declaration's own wins. `models` are
    those of other rewards, which this one may share; a new one is added.
    """
    models = {} if models is None else models
    if spec.function is not None:
        return FunctionReward(name, spec, root)
    if spec.url is not None:
        # Only now: other projects need no client.
        from rewarded_lines.rewards.api_judge import ApiJudge
        from rewarded_lines.rewards.http_rewards import HttpReward

        return HttpReward(name, spec) if spec.judge is None else ApiJudge(name, spec)
    if spec.judge is not None:
        return LocalJudge(name, spec, _located(spec.judge, root), device, models)
    assert spec.model is not None
    tokenizer = _located(spec.tokenizer, root) if spec.tokenizer else None
    shared = share_classifier(models, f"reward `{name}`", spec, _located(spec.model, root), tokenizer, device)
    return ModelReward(name, spec, shared)


def _located(reference: str, root: Path) -> str:
    return str(local_path(reference, root)) if looks_local(reference, root) else reference


def free_all(rewards: Iterable[Reward]) -> None:
    """Free each reward."""
    for reward in rewards:
        reward.free()


def reward_limits(
    rewards: Mapping[str, Reward], tokenizer: Any, prompts: Sequence[Prompt], response_tokens: int
) -> Iterator[Limit]:
    """Yield each reward's limit on prompts; it leaves room for a response of the policy.

    With the policy's vocabulary, a reward model also needs n tokens for a response of n tokens. With another one, it
    needs about r·n, where r is the ratio of both models' tokens over the prompts.
    """
    for name, reward in rewards.items():
        if reward.limit is None:
            continue
        responses = 2 if reward.reads_sft else 1
        room = math.ceil(responses * response_tokens * _token_ratio(reward, tokenizer, prompts)) + _SLACK
        if room >= reward.limit:
            raise fail(
                "a response may be longer than the reward model can read",
                where=f"reward `{name}`",
                expected=f"at most {reward.limit} tokens, prompt included",
                got=f"{response_tokens} tokens of the policy, about {room} of the reward model's",
                remedy="lower the length of responses, or raise `max_tokens` of the reward if the model can read more",
            )
        yield Limit(
            f"reward `{name}`, {room} of its {reward.limit} being the response's",
            reward.limit - room,
            f"`max_tokens` of the reward, or all that the model can read: {reward.limit}",
            lambda rows, reward=reward: reward.lengths(rows, [""] * len(rows)),  # type: ignore[misc]
        )


def _token_ratio(reward: Any, tokenizer: Any, prompts: Sequence[Prompt]) -> float:
    """Return the reward model's tokens per token of the policy, at least 1."""
    if reward.tokenizer.get_vocab() == tokenizer.get_vocab():
        return 1.0
    texts = [text for prompt in prompts[:_ESTIMATED_FROM] if (text := prompt_text(prompt))]
    own, policy = (
        sum(map(len, one(texts, add_special_tokens=False)["input_ids"])) if texts else 1
        for one in (reward.tokenizer, tokenizer)
    )
    return max(1.0, own / max(policy, 1))


def _make_room(rewards: dict[str, Reward]) -> None:
    """Let the models on the last one's device rest if a further model of the largest size might not fit."""
    last = next(reversed(rewards.values()))
    beside = [reward for reward in rewards.values() if reward.size and reward.device == last.device]
    if last.size and available_memory(last.device) < max(reward.size for reward in beside):
        for reward in beside:
            reward.rest()

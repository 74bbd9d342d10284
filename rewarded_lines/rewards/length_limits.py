"""What reward models can read of prompts and the longest responses to them, by their own tokenizers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rewarded_lines.data.lengths import Limit
from rewarded_lines.data.prompts import Prompt, prompt_text
from rewarded_lines.errors import fail
from rewarded_lines.rewards.load_rewards import Reward

# Prompts from which is reckoned how many tokens a reward model has for one of the policy's.
_RECKONED = 200
# Where prompt and response meet, tokens may be others than on either side.
_SLACK = 2


def reward_limits(
    rewards: Mapping[str, Reward], tokenizer: Any, prompts: Sequence[Prompt], response_tokens: int
) -> Iterator[Limit]:
    """Yield for each reward with a limit how long prompts may be, so that every response fits beside them.

    A response of n tokens of the policy has n for a reward model with the same vocabulary. With another, it has about
    r·n, where r is the ratio of both models' tokens over the prompts.

    Args:
        rewards: by name.
        tokenizer: the policy's.
        prompts: to be answered.
        response_tokens: the most tokens of a response.

    Raises:
        UserError: a response by itself may be longer than a reward model can read.
    """
    for name, reward in rewards.items():
        if reward.limit is None:
            continue
        room = math.ceil(response_tokens * _ratio(reward, tokenizer, prompts)) + _SLACK
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


def _ratio(reward: Any, tokenizer: Any, prompts: Sequence[Prompt]) -> float:
    """Return how many tokens a reward model has for one of the policy's, at least 1."""
    if reward.tokenizer.get_vocab() == tokenizer.get_vocab():
        return 1.0
    texts = [text for prompt in prompts[:_RECKONED] if (text := prompt_text(prompt))]
    counts = [
        sum(map(len, one(texts, add_special_tokens=False)["input_ids"])) if texts else 1
        for one in (reward.tokenizer, tokenizer)
    ]
    return max(1.0, counts[0] / max(counts[1], 1))

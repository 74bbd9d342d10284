"""The prompts that the SFT model and every reward can read, found before anything is generated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rewarded_lines.config import DataSpec
from rewarded_lines.data.forms import Tell, silent
from rewarded_lines.data.lengths import Limit, fit, positions_of, shorten_prompt
from rewarded_lines.data.messages import check_template
from rewarded_lines.data.prompts import Prompt, encode
from rewarded_lines.engines.responses import ResponseReader
from rewarded_lines.engines.tokens import load_config, load_tokenizer
from rewarded_lines.planning.plan import Plan
from rewarded_lines.projects import Project
from rewarded_lines.scoring.limits import reward_limits
from rewarded_lines.scoring.rewards import Reward


def readable(
    spec: DataSpec,
    prompts: Sequence[Prompt],
    project: Project,
    plan: Plan,
    rewards: Mapping[str, Reward],
    tell: Tell = silent,
) -> list[Prompt]:
    """Return the prompts that the model and every reward can read, with the longest response.

    Args:
        spec: of the prompts; says what becomes of the others.
        prompts: to be answered.
        project: with the generation settings.
        plan: with the SFT model.
        rewards: by name.
        tell: called with what was found and done.

    Raises:
        UserError: prompts are too long and shall be refused, or something of a chat would be lost.
    """
    base, generation = str(plan.base.folder), project.generation
    tokenizer = load_tokenizer(base, generation)
    ResponseReader.of(tokenizer, (), generation)
    where = spec.file or str(spec.dataset)
    if chats := [prompt for prompt in prompts if isinstance(prompt, list)]:
        check_template(tokenizer, chats, where)
    for reward in rewards.values():
        if note := reward.check(prompts):
            tell(note)
    limits = list(reward_limits(rewards, tokenizer, prompts, generation.max_tokens))
    room = positions_of(load_config(base))
    if room is not None:
        # One position more than generation needs: to learn how likely the last token is takes one step beyond it.
        most, option = room - generation.max_tokens - 1, f"its {room} positions, less generation.max_tokens and one"
        limits.append(Limit("the model", most, option, lambda rows: [len(row) for row in encode(tokenizer, rows)]))
    return fit(prompts, limits, spec.too_long, where, shorten_prompt, tell)

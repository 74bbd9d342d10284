"""Rewards of the packages suite that are plain functions: what a summary keeps of a text, and how short it is."""

from __future__ import annotations

import re
from collections.abc import Sequence

# What an answer without a word counts as: it is as short as can be, but no summary.
NO_WORDS = 40
# Words that say nothing about a package, and those that every description has.
COMMON = frozenset(
    """a an and are as at be been but by can for from has have if in into is it its may more not of on one or other
    package packages provides same so some such than that the their them then there these this those to used uses using
    was well when which will with you your""".split()
)


def faithful(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Return 100 R P for each pair: R is the share of the description's content words that the response has (ROUGE-1's
    recall, each word counted once), P the share of the response's content words that the description has.

    Copying more raises R, words of one's own lower P. Without content words on either side the score is 0.
    """
    return [_overlap(_content(prompt), _content(response)) for prompt, response in zip(prompts, responses, strict=True)]


def brief(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Return minus the number of words of each response, and -40 for a response without words."""
    return [-float(len(response.split()) or NO_WORDS) for response in responses]


def _overlap(description: set[str], response: set[str]) -> float:
    both = len(description & response)
    return 100 * both / len(description) * both / len(response) if both else 0.0


def _content(text: str) -> set[str]:
    """Return the words of a text, in lower case, without the common ones."""
    return set(re.findall(r"\w+", text.lower())) - COMMON

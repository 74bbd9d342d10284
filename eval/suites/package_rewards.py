"""Rewards of the packages suite that are functions: how much a summary says of a text, how short, how plain it is.

`faithful` reads both texts with the sentence encoder ENCODER, of the Hub or a folder. The others need no model.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any

# Part of this file, since other scores need another file: kept ones go by its hash.
ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
# What an answer without a word counts as: it is as short and plain as can be, but no summary.
NO_WORDS = 40
# Words that say nothing about a package, and those that every description has.
COMMON = frozenset(
    """a an and are as at be been but by can for from has have if in into is it its may more not of on one or other
    package packages provides same so some such than that the their them then there these this those to used uses using
    was well when which will with you your""".split()
)


def faithful(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Return 100 cos(e(description), e(response)) of each pair, e the mean of MiniLM's last hidden states over tokens.

    A response without words is 0. Source: Reimers and Gurevych, "Sentence-BERT", 2019.
    """
    return [
        100 * float(_embedding(prompt) @ _embedding(response)) if response.split() else 0.0
        for prompt, response in zip(prompts, responses, strict=True)
    ]


def brief(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Return minus the number of words of each response, and -40 for a response without words."""
    return [-float(len(response.split()) or NO_WORDS) for response in responses]


def readable(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Return minus the automated readability index of each response, read as one sentence, and -40 without words.

    ARI = 4.71 letters/words + 0.5 words/sentences − 21.43 (Senter and Smith, 1967), in years of school.
    """
    return [_plainness(re.findall(r"\w+", response)) for response in responses]


def overlap(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Return 100 R P for each pair: R is the share of the description's content words that the response has (ROUGE-1's
    recall, each word counted once), P the share of the response's content words that the description has.

    Copying more raises R, words of one's own lower P. Without content words on either side the score is 0.
    """
    return [_shared(_content(prompt), _content(response)) for prompt, response in zip(prompts, responses, strict=True)]


@cache
def _encoder() -> tuple[Any, Any]:
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ENCODER, trust_remote_code=False)
    return tokenizer, AutoModel.from_pretrained(ENCODER, trust_remote_code=False).eval()


@lru_cache(maxsize=1 << 14)
def _embedding(text: str) -> Any:
    """Return a text's unit vector; alone, not in a padded batch, so that it depends on nothing else."""
    import torch

    tokenizer, model = _encoder()
    with torch.inference_mode():
        states = model(**tokenizer(text, truncation=True, max_length=256, return_tensors="pt")).last_hidden_state[0]
        return torch.nn.functional.normalize(states.mean(dim=0), dim=0)


def _plainness(words: Sequence[str]) -> float:
    if not words:
        return -float(NO_WORDS)
    return 21.43 - 4.71 * sum(map(len, words)) / len(words) - 0.5 * len(words)


def _shared(description: set[str], response: set[str]) -> float:
    both = len(description & response)
    return 100 * both / len(description) * both / len(response) if both else 0.0


def _content(text: str) -> set[str]:
    """Return the words of a text, in lower case, without the common ones."""
    return set(re.findall(r"\w+", text.lower())) - COMMON

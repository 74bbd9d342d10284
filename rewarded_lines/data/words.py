"""Words of responses: how many, and how varied. Chinese and Japanese have no spaces between theirs."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import pairwise

# Kana and Chinese characters are a word each, as in the tokenizer `zh` of sacreBLEU; their punctuation is none.
_CHARACTER, _BETWEEN = r"\u3041-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff", r"\s\u3000-\u303f！，：；？（）"
_WORD = re.compile(f"[{_CHARACTER}]|[^{_CHARACTER}{_BETWEEN}]+")


def words_in(text: str) -> list[str]:
    """Return the words of a text: what white space separates, and every Chinese or Japanese character."""
    return _WORD.findall(text)


def distinct2(responses: Iterable[str]) -> float:
    """Return the number of different pairs of neighbouring words over that of all pairs; 0 without pairs.

    Source: Li et al., "A Diversity-Promoting Objective Function for Neural Conversation Models", 2016.
    """
    pairs = [pair for text in responses for pair in pairwise(words_in(text))]
    return len(set(pairs)) / len(pairs) if pairs else 0.0

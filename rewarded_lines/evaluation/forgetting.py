"""Forgetting: how much worse a policy predicts texts that have nothing to do with its task. Pure numbers.

Perplexity = exp(Σ −log π(token) / tokens) over all control texts, as in the language-modelling literature.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def control_pairs(ids: Sequence[Sequence[int]], room: int) -> list[tuple[int, list[int], list[int]]]:
    """Return (text, head, tail) for every window of every text.

    A text longer than the model can hold is cut into windows that do not overlap. The first token of a window has
    nothing before it and is not predicted, so that a window of one token counts for nothing.

    Args:
        ids: tokens of each text.
        room: the most tokens that a window can have, at least 2.
    """
    windows = [
        (text, list(row[start : start + room])) for text, row in enumerate(ids) for start in range(0, len(row), room)
    ]
    return [(text, window[:1], window[1:]) for text, window in windows if len(window) > 1]


def control_sums(
    texts: int, windows: Sequence[tuple[int, list[int], list[int]]], logprobs: Sequence[float]
) -> np.ndarray:
    """Return each text's negative log-likelihood in nats and how many tokens were predicted, [texts, 2]."""
    sums = np.zeros((texts, 2))
    for (text, _, tail), logprob in zip(windows, logprobs, strict=True):
        sums[text] += (-logprob, len(tail))
    return sums


def perplexity(sums: np.ndarray) -> np.ndarray:
    """Return exp(nats / tokens) for sums [..., 2] over texts."""
    return np.asarray(np.exp(sums[..., 0] / sums[..., 1]))

"""Points at equal KL to the SFT model: one that lies too far lets the SFT model answer some of the prompts.

Functions raise ValueError for arrays that do not fit.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from rewarded_lines.pareto.hypervolume import Array


def drawn_back(means: ArrayLike, kl: ArrayLike, sft: ArrayLike, most: float) -> Array:
    """Return mean scores of points with a KL of at most `most`, [..., points, rewards].

    A point with a larger KL answers a prompt with probability t, chosen by lot, and the SFT model answers it else:

        s(t) = s_SFT + t·(s − s_SFT),   KL(t) = t·KL,   t = min(1, most/KL)

    Both are exact means of what this lot answers, so every such point can be reached with the measured model alone. A
    merge with a shorter step may do better: near the SFT model its KL falls faster than its reward.

    Args:
        means: s, [..., points, rewards].
        kl: mean KL to the SFT model, [..., points], in nats; one that noise makes negative is below any limit.
        sft: s_SFT, [..., rewards].
        most: the largest KL in nats, above 0.
    """
    scores, far, start = (np.asarray(one, dtype=np.float64) for one in (means, kl, sft))
    if scores.shape[:-1] != far.shape or scores.shape[:-2] + scores.shape[-1:] != start.shape:
        raise ValueError(f"scores of shape {scores.shape}, KL of {far.shape}, SFT's scores of {start.shape}")
    if not most > 0:
        raise ValueError(f"a largest KL of {most}; expected one above 0")
    share = np.divide(most, far, out=np.ones_like(far), where=far > most)[..., None]
    origin = start[..., None, :]
    # Points within the limit stay as they are, bit for bit.
    return np.where(share < 1, origin + share * (scores - origin), scores)

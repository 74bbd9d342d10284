"""Responses without a score: how many there are, why, and when too few are left to go on.

A score is missing (NaN) where the reward abstained (it returned None: it has no say on the row), or
where it failed for good and the project allows that. A mean is over what is there:

    mᵢ = Σ_j h_ij·s_ij / Σ_j h_ij,    h_ij = 1 if prompt j has a score of reward i, else 0

s_ij is the mean of the prompt's responses that have a score. A policy's gain over the SFT model uses
the prompts where both have one: Σ_j h_ij·h'_ij·(s_ij − s'_ij) / Σ_j h_ij·h'_ij. Fronts and choices
use each point's own mᵢ, so points with different gaps are measured on different prompts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rewarded_lines.errors import Problem
from rewarded_lines.pareto.bootstrap import present_mean

# An interval needs two prompts.
FEWEST = 2
# More responses that do not end may be what the user wants.
_MUCH_CUT = 0.5


@dataclass(frozen=True)
class Missing:
    """How many of `responses` have no score of a reward; as text, "12 of 200 responses have no score (…)"."""

    responses: int
    abstained: int
    failed: int = 0

    @property
    def count(self) -> int:
        """Responses without a score."""
        return self.abstained + self.failed

    def __str__(self) -> str:
        """Return the counts and the reasons in words."""
        reasons = {"abstained": self.abstained, "failed": self.failed}
        told = ", ".join(f"{count} {reason}" for reason, count in reasons.items() if count)
        return f"{self.count} of {self.responses} responses have no score ({told})"


def count_missing(scores: Mapping[str, NDArray[np.float64]], failed: Mapping[str, int]) -> dict[str, Missing]:
    """Return the counts of each reward with a missing score; what did not fail, abstained.

    Args:
        scores: one for each response by reward, NaN where there is none.
        failed: by reward, how many of these responses the reward failed on for good.
    """
    counts = {name: int(np.isnan(values).sum()) for name, values in scores.items()}
    lost = {name: min(failed.get(name, 0), count) for name, count in counts.items()}
    return {name: Missing(len(scores[name]), count - lost[name], lost[name]) for name, count in counts.items() if count}


def missing_lines(missing: Mapping[str, Missing]) -> list[str]:
    """Return a sentence for each reward, "reward `x`: 12 of 200 responses have no score (…)"."""
    return [f"reward `{name}`: {counts}" for name, counts in missing.items()]


def missing_json(missing: Mapping[str, Missing]) -> dict[str, Any]:
    """Return `{"missing": …}` for JSON, or nothing where no score is missing."""
    return {"missing": {name: vars(counts) for name, counts in missing.items()}} if missing else {}


def prompt_means(values: NDArray[np.float64], prompts: int) -> NDArray[np.float64]:
    """Return the mean of each prompt's scores that are there, [responses, …] → [prompts, …]; NaN for none."""
    return present_mean(values.reshape(prompts, -1, *values.shape[1:]), axis=1)


def too_few(
    where: str, scores: Mapping[str, NDArray[np.float64]], prompts: int, missing: Mapping[str, Missing]
) -> list[Problem]:
    """Return a problem for each reward that has no score for all prompts, or for all but one."""
    scored = {name: int((~np.isnan(prompt_means(scores[name], prompts))).sum()) for name in missing if name in scores}
    return [
        Problem(
            "too few prompts have a score",
            where=f"{where}, reward `{name}`",
            expected=f"a score for {FEWEST} prompts or more",
            got=f"{count} of {prompts} prompts; {missing[name]}",
            remedy="let the reward score more of the prompts, or begin a new run without it: `--out FOLDER`",
        )
        for name, count in scored.items()
        if count < FEWEST
    ]


def doubts(point: object, scores: Mapping[str, NDArray[np.float64]], ended: NDArray[np.bool_], most: int) -> list[str]:
    """Return what makes a point's scores doubtful: rewards with one score for all, responses cut off at `most` tokens.

    Args:
        point: names it, usually the SFT model's.
        scores: of the rewards that should tell its responses apart.
        ended: whether each response ended by itself.
        most: the token limit of a response.
    """
    there = {name: values[~np.isnan(values)] for name, values in scores.items()}
    notes = [
        f"reward `{name}` gives every response of {point} the score {values[0]:g}, so it tells nothing apart yet: "
        "check the function, the columns that it reads, and the prompts"
        for name, values in there.items()
        if len(values) > 1 and values.min() == values.max()
    ]
    if (cut := 1 - float(np.mean(ended))) > _MUCH_CUT:
        notes.append(
            f"{cut:.0%} of the responses of {point} are cut off after {most} tokens, and rewards read them so; "
            "`generation: {max_tokens: …}` allows more"
        )
    return notes

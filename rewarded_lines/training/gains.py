"""What scores of responses come to: means, a policy's gain over the SFT model, and how many have no score.

A reward that abstained on a response left NaN there. A mean is over the responses that have a score, a gain over the
prompts that have one before and after training.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rewarded_lines.errors import UserError, fail

# An interval needs two.
_FEWEST = 2


def scored(scores: Sequence[float]) -> list[float]:
    """Return the scores that are there."""
    return [score for score in scores if not math.isnan(score)]


def summary(scores: Sequence[float]) -> str:
    """Return mean and standard error of the scores that are there as text, and how many are not."""
    there = scored(scores)
    error = statistics.stdev(there) / len(there) ** 0.5 if len(there) > 1 else float("nan")
    without = f"; {len(scores) - len(there)} of {len(scores)} have no score" if len(there) < len(scores) else ""
    return f"{statistics.fmean(there):.2f} (s.e. {error:.2f}{without})"


def describe(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Return gains as text, one reward per line."""
    return "\n".join(
        f"`{name}` on validation prompts: {one['before']:.3g} -> {one['after']:.3g}, "
        f"gain {one['gain']:+.3g} [{one['gain_interval'][0]:.3g}, {one['gain_interval'][1]:.3g}]{_abstained(one)}"
        for name, one in found.items()
    )


def paired_gain(before: Sequence[float], after: Sequence[float], name: str = "") -> dict[str, Any]:
    """Return both means, the mean paired gain, and its 95% interval (normal approximation).

    The gain is Σ h·h'·(s' − s) / Σ h·h', with h = 1 where a prompt has a score s before, h' where it has s' after.
    `abstained` counts the responses without a score, if there are any.

    Raises:
        UserError: scores of the reward `name` are missing, and fewer than two prompts have one both times.
    """
    differences = scored([new - old for old, new in zip(before, after, strict=True)])
    abstained = {"before": len(before) - len(scored(before)), "after": len(after) - len(scored(after))}
    if any(abstained.values()) and len(differences) < _FEWEST:
        raise _too_few(name, f"{len(before)} prompts, before and after training", len(differences))
    mean = statistics.fmean(differences)
    half = 1.96 * statistics.stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else float("nan")
    return {
        "before": statistics.fmean(scored(before)),
        "after": statistics.fmean(scored(after)),
        "gain": mean,
        "gain_interval": [mean - half, mean + half],
        **({"abstained": abstained} if any(abstained.values()) else {}),
    }


def check_scored(found: Mapping[str, Sequence[float]]) -> None:
    """Refuse rewards that give the SFT model's validation responses no score, or only one."""
    for name, scores in found.items():
        if (count := len(scored(scores))) < min(_FEWEST, len(scores)):
            raise _too_few(name, f"SFT model's {len(scores)} responses to the validation prompts", count)


def _too_few(name: str, what: str, count: int) -> UserError:
    return fail(
        "the reward abstains on almost everything",
        where=f"reward `{name}`",
        expected=f"a score for {_FEWEST} or more of the {what}",
        got=str(count),
        remedy="validate on prompts that the reward scores (`validation_file`), and on more (`validation_limit`)",
    )


def _abstained(gain: Mapping[str, Any]) -> str:
    counts = gain.get("abstained")
    return f"; no score for {counts['before']} responses before, {counts['after']} after" if counts else ""

"""The demo's algorithms and stages, and about how long each stage takes. Loads nothing: command lines show them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

ALGORITHMS = ("ppo", "dpo", "rloo", "grpo")


@dataclass(frozen=True)
class Stage:
    """A stage of the demo: what it does, its seconds on two quiet cores in both forms, and the extra that it needs."""

    about: str
    short: float
    long: float
    extra: str = ""


PLAN: Mapping[str, Stage] = {
    "data": Stage("reads reviews of movies, and splits them by movie", 3, 3),
    "sft": Stage("a small language model learns to write reviews", 108, 160, "train"),
    "reward": Stage("a classifier learns which reviews are positive", 64, 110, "train"),
    "policies": Stage("one policy for each reward, trained side by side", 51, 90, "train"),
    "sweep": Stage("merges of the policies answer the same prompts", 67, 230, "eval"),
    "report": Stage("draws the front of each method", 4, 7, "report"),
    "merge": Stage("writes one merged policy", 1, 1),
}
STAGES = tuple(PLAN)

"""What a demo is asked for, and its two forms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rewarded_lines.demo.stages import PLAN
from rewarded_lines.recipe_files import files_root

# The run folder in the recipes' demo configs; the command line replaces it.
CONFIGURED = "runs/demo"
_CONFIGS = files_root() / "recipes" / "configs" / "demo"
_SUITES = files_root() / "eval" / "suites"
SHORT_SUITE, LONG_SUITE = _SUITES / "movie_reviews_short.yaml", _SUITES / "movie_reviews.yaml"
# What the long form sets otherwise than the demo's configs.
LONGER: Mapping[str, Mapping[str, str]] = {
    "sft": {
        "num_train_epochs": "2",
        "per_device_train_batch_size": "64",
        "learning_rate": "5.0e-3",
        "validation_limit": "null",
    },
    "reward": {
        "num_train_epochs": "2",
        "per_device_train_batch_size": "32",
        "train_sampling_strategy": "random",
    },
    "ppo": {
        "total_episodes": "1280",
        "validation_limit": "256",
        "num_ppo_epochs": "2",
        "num_mini_batches": "2",
        "learning_rate": "6.0e-4",
    },
}


@dataclass(frozen=True)
class DemoSettings:
    """The run folder, the algorithm, the training seed, the sweep's engine, and the user's own files.

    `full` is the long form, which made the records in eval/results/movie_reviews.
    """

    out: Path
    algo: str = "ppo"
    seed: int = 0
    engine: str = "vllm"
    full: bool = False
    configs: Path = _CONFIGS
    suite: Path = SHORT_SUITE
    corpus: Path | None = None

    def __post_init__(self) -> None:
        """Take the suite of the long form, if the user brings no other."""
        if self.full and self.suite == SHORT_SUITE:
            object.__setattr__(self, "suite", LONG_SUITE)

    @property
    def own_configs(self) -> bool:
        """True if the user brings the recipes' configs."""
        return self.configs != _CONFIGS

    def overrides(self, recipe: str) -> dict[str, str]:
        """Return what the long form changes in a recipe's config."""
        return dict(LONGER.get(recipe, {})) if self.full else {}

    def expected(self, stage: str) -> float:
        """Return about how many seconds a stage takes on two quiet cores."""
        return PLAN[stage].long if self.full else PLAN[stage].short


def default_out(algo: str, seed: int, full: bool = False) -> Path:
    """Return the run folder for an algorithm and a seed: runs/demo, runs/demo-dpo, runs/demo-full-seed1 ..."""
    parts = [CONFIGURED, "full" if full else "", "" if algo == "ppo" else algo, f"seed{seed}" if seed else ""]
    return Path("-".join(part for part in parts if part))

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
# Policies as adapters of the SFT model, whose weights then stay. The dropout of 0 keeps PPO's ratios at 1.
ADAPTERS: Mapping[str, str] = {"use_peft": "true", "lora_r": "16", "lora_alpha": "32", "lora_dropout": "0.0"}
# Adapters learn with a rate of their own, in both forms of the demo.
ADAPTER_RATES: Mapping[str, str] = {"ppo": "4.0e-3", "rloo": "4.0e-3", "grpo": "4.0e-3", "dpo": "1.2e-3"}


@dataclass(frozen=True)
class DemoSettings:
    """The run folder, the algorithm, the training seed, the sweep's engine, and the user's own files.

    `full` is the long form, which made the records in eval/results/movie_reviews. `lora` trains adapters.
    """

    out: Path
    algo: str = "ppo"
    seed: int = 0
    engine: str = "vllm"
    full: bool = False
    lora: bool = False
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
        """Return what the long form and adapters change in a recipe's config."""
        longer = dict(LONGER.get(recipe, {})) if self.full else {}
        if not self.lora or recipe not in ADAPTER_RATES:
            return longer
        return {**longer, **ADAPTERS, "learning_rate": ADAPTER_RATES[recipe]}

    def expected(self, stage: str) -> float:
        """Return about how many seconds a stage takes on two quiet cores."""
        return PLAN[stage].long if self.full else PLAN[stage].short


def default_out(algo: str, seed: int, full: bool = False, lora: bool = False) -> Path:
    """Return the run folder: runs/demo, runs/demo-dpo, runs/demo-lora, runs/demo-full-seed1 ..."""
    forms = {"full": full, "lora": lora, algo: algo != "ppo", f"seed{seed}": seed}
    return Path("-".join([CONFIGURED, *(name for name, is_so in forms.items() if is_so)]))

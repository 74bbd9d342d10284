"""The options of `rounds`, for Python and for the command line, which reads this file at its start."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rewarded_lines.errors import Problem, UserError
from rewarded_lines.options import option

# Fields of `MergeOptions` that a round decides.
DECIDED = (
    *("score", "as_", "rank", "out", "overwrite", "allow_nonfinite", "tokenizer", "config_from", "additions"),
    *("progress", "preference", "mixtures"),
)


@dataclass(frozen=True)
class RoundOptions:
    """How many rounds there are, how policies are trained in them, and how their models are measured.

    Attributes:
        eta: η of WARP: a round ends with (1 − η)·θ_start + η·θ_merged.
        ema: μ of WARP: the KL is to θ_ema ← (1 − μ)·θ_ema + μ·θ, averaged after each update.
    """

    rounds: int = option(3, "How many rounds; more may be added later.", min=1)
    eta: float = option(1.0, "η: draw each merge back to its round's start: (1 − η)·start + η·merge.")
    ema: float | None = option(
        None, "μ: the KL is to a moving average of the policy that takes so much of it at each update."
    )
    training_seed: int = option(0, "Seed of the first policy; each next policy, also of later rounds, has the next.")
    at_once: int = option(1, "How many policies train side by side.", min=1)
    score: str | Path | None = option(
        None, "Measure each round's model on the prompts in this file: validation, not test.", typed=Path | None
    )
    engine: str = option("vllm", "With --score: vllm or hf.", offers=("vllm", "hf"))

    def __post_init__(self) -> None:
        """Refuse numbers out of range."""
        checks = (
            ("rounds", self.rounds, self.rounds >= 1, "1 or more"),
            ("at-once", self.at_once, self.at_once >= 1, "1 or more"),
            ("eta", self.eta, 0 < self.eta <= 1, "0 < η ≤ 1"),
            ("ema", self.ema, self.ema is None or 0 < self.ema <= 1, "0 < μ ≤ 1"),
        )
        if wrong := [
            Problem("out of range", where=f"--{name}", expected=expected, got=str(value))
            for name, value, fits, expected in checks
            if not fits
        ]:
            raise UserError(wrong)

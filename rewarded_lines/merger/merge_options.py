"""How policies are merged and written: the options of `merge`, for Python and for the command line.

The command line imports this file at its start, so nothing here may load a heavy library.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rewarded_lines.checkpoints.families import KINDS
from rewarded_lines.merger.lines_schedule import Outside
from rewarded_lines.merger.method_row import OptionValue
from rewarded_lines.merger.methods import METHODS
from rewarded_lines.merger.schedule_forms import Coefficients, Factors, Values
from rewarded_lines.options import option
from rewarded_lines.progress import SILENT, Progress

Score = str | Callable[[Path], float]
TOWER_HELP = "vision=base keeps a tower as the base has it, =flat gives it α, =depth a depth of its own; repeat."
METHODS_PANEL = "Options of the methods"


def joined_towers(towers: str | Sequence[str] | None) -> str | None:
    """Return several texts such as `vision=flat` as one, separated by commas; None without any."""
    return towers if isinstance(towers, str) else ",".join(towers or ()) or None


def _methods_that_begin(incomplete: str) -> list[tuple[str, str]]:
    return [(name, row.summary) for name, row in METHODS.items() if name.startswith(incomplete)]


@dataclass(frozen=True)
class MergeOptions:
    """How policies are merged and written, for Python and for the command line; the help texts describe the fields.

    Attributes:
        alpha: a number, or numbers by policy; None is 1. "auto" chooses (‖Σ τ_i‖₁/‖m‖₁)/N, as LiNeS' authors do.
        beta: likewise.
        schedule: a coefficient for each block in place of α and β; see `read_schedule`.
        modules: factors by kind of module, e.g. {"mlp": 0.8}.
        options: of the method, e.g. {"density": 0.2}.
        preference: μ over rewards, or several; as `lam`, with the rewards in the order of `mixtures`.
        mixtures: the share of each reward that each policy was trained for; see preferences.py.
        score: or a function from a model's folder to a number; higher is better.
        dtype: "auto" gives each tensor the widest type that it has in the inputs.
        additions: adds to the model cards, see `Additions` in model_card.py.
        progress: receives the steps and the bytes written.
    """

    alpha: Values | Literal["auto"] = option(
        None,
        "LiNeS α: scale of the first block, 1 if not given; auto for the authors' choice; POLICY=α for one policy.",
        typed=list[str] | None,
    )
    beta: Values = option(
        None,
        "LiNeS β: added by the last block, 1 if not given; 0 is Rewarded Soups; POLICY=β for one policy.",
        typed=list[str] | None,
    )
    schedule: Coefficients = option(
        None,
        "In place of α and β, a scale for each block: 1,1,1.2 or a file; POLICY=1,1,1.2 for one policy, repeat.",
        typed=list[str] | None,
    )
    modules: Factors = option(None, f"Factors by kind of module, mlp=0.8: {', '.join(KINDS)}.", typed=list[str] | None)
    outside: Outside = option(
        "alpha",
        "What embeddings, norm and head get: alpha, or depth (as the block beside them).",
        typed=str,
        offers=("alpha", "depth"),
    )
    method: str = option(
        "soup",
        f"How residuals are joined: {', '.join(METHODS)}; see below.",
        offers=_methods_that_begin,
    )
    options: Mapping[str, OptionValue] = field(default_factory=dict)
    preference: Any = option(
        None,
        "Instead of --lam: μ of the first of two rewards, or a=0.7,b=0.3; the project's `mixtures:` give λ; repeat.",
        typed=list[str] | None,
    )
    mixtures: Mapping[str, Mapping[str, float]] | None = None
    score: Score | None = option(
        None,
        "greedy: a command that prints a number for {model}, or file.py:function.",
        typed=str | None,
        rich_help_panel=METHODS_PANEL,
    )
    as_: str = option(
        "auto",
        "full models, LoRA adapter, or auto: an adapter if all policies are adapters.",
        offers=("auto", "full", "adapter"),
    )
    rank: int | None = option(None, "adapter: the nearest of this rank, also of whole policies; what it keeps is told.")
    out: str | Path | None = option(None, "Output folder; default merged/lam=…", typed=Path | None)
    dtype: str = option(
        "auto", "auto, float32, bfloat16 or float16.", offers=("auto", "float32", "bfloat16", "float16")
    )
    device: str = option("cpu", "cpu, cuda or cuda:1; auto: a GPU where it is faster.", offers=("cpu", "cuda", "auto"))
    max_shard_size: str = option("5GB", "Largest weight file.")
    rehash: bool = option(False, "Hash all inputs again; large files that have not changed are hashed once.")
    overwrite: bool = option(False, "Replace an existing output.")
    dry_run: bool = option(False, "Check everything, write nothing.")
    extrapolate: bool = option(False, "Allow λ outside the simplex.")
    allow_nonfinite: bool = option(False, "Let NaN and infinite values pass.")
    layers: str | None = option(None, r"Pattern of the block list, e.g. 'blocks\.(\d+)\.'")
    tower: str | None = option(None, TOWER_HELP, typed=list[str] | None)
    tokenizer: str = option(
        "auto",
        "Whose tokenizer and chat template the output gets: base, a policy's name, a folder; auto: the policies'.",
    )
    config_from: str = option(
        "auto", "Whose generation_config.json and end tokens: base, a policy's name; auto: the policies'."
    )
    # Importing the type `Additions` would load numpy.
    additions: Callable[[Any], Any] | None = None
    progress: Progress = SILENT

    def __post_init__(self) -> None:
        """Join the towers if they are several."""
        object.__setattr__(self, "tower", joined_towers(self.tower))

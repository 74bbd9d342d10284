"""`MergeOptions`: how policies are merged and written, declared once for Python and for the command line.

Importing this module loads no heavy library, because the command line reads it at its start.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rewarded_lines.merger.methods import METHODS, OptionValue
from rewarded_lines.progress import SILENT, Progress

Score = str | Callable[[Path], float]
METHODS_PANEL = "Options of the methods"


def option(default: Any, about: str, **more: Any) -> Any:
    """Return a field with the help text of its command-line option, and more that `as_option` takes."""
    return field(default=default, metadata={"help": about, **more})


def methods_that_begin(incomplete: str) -> list[tuple[str, str]]:
    """Return the merge methods whose names begin as what is typed, with their summaries."""
    return [(name, row.summary) for name, row in METHODS.items() if name.startswith(incomplete)]


@dataclass(frozen=True)
class MergeOptions:
    """How policies are merged and written, beside which policies and with which weights.

    Attributes:
        alpha: α, the scale of the first block; "auto" chooses (‖Σ τ_i‖₁/‖m‖₁)/N, as LiNeS' authors do.
        beta: β; 0 with α = 1 is plain Rewarded Soups.
        outside: what embeddings, final norm and head get: "alpha" gives α, "depth" the scale of the block beside them.
        method: a key of `rewarded_lines.merger.methods.METHODS`.
        options: of the method, e.g. {"density": 0.2}.
        score: for the method "greedy", a function from a model's folder to a number, `file.py:function`, or a
            command that prints one; higher is better.
        as_: what to write: "full" models, LoRA adapters ("adapter"), or "auto": adapters if all policies are adapters.
        out: the output folder; with several λ each gets a folder `lam=…` in it. The default is
            `merged/lam=…` in the working directory.
        dtype: "auto" (the widest each tensor has in the inputs), "float32", "bfloat16" or "float16".
        device: where the arithmetic runs.
        max_shard_size: the largest weight file, for example "5GB".
        overwrite: replace an existing output.
        dry_run: do the pre-flight and say what would be written, no more.
        extrapolate: allow weights that are negative or do not sum to 1.
        allow_nonfinite: let NaN and infinite values pass.
        layers: the pattern of the block list, for layouts that are not known.
        additions: what the model cards show beside what the merge knows, see `rewarded_lines.publishing`.
        progress: is told of the steps, and of the bytes that are written.
    """

    alpha: float | Literal["auto"] = option(
        1.0, "LiNeS α: scale of the first block; auto for the authors' choice.", typed=str
    )
    beta: float = option(1.0, "LiNeS β: added by the last block; 0 is Rewarded Soups.")
    outside: Literal["alpha", "depth"] = option(
        "alpha",
        "What embeddings, norm and head get: alpha, or depth (as the block beside them).",
        typed=str,
        offers=("alpha", "depth"),
    )
    method: str = option(
        "soup", f"How residuals are joined: {', '.join(METHODS)}; see below.", offers=methods_that_begin
    )
    options: Mapping[str, OptionValue] = field(default_factory=dict)
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
    out: str | Path | None = option(None, "Output folder; default merged/lam=…", typed=Path | None)
    dtype: str = option(
        "auto", "auto, float32, bfloat16 or float16.", offers=("auto", "float32", "bfloat16", "float16")
    )
    device: str = option("cpu", "cpu, cuda or cuda:1.")
    max_shard_size: str = option("5GB", "Largest weight file.")
    overwrite: bool = option(False, "Replace an existing output.")
    dry_run: bool = option(False, "Check everything, write nothing.")
    extrapolate: bool = option(False, "Allow λ outside the simplex.")
    allow_nonfinite: bool = option(False, "Let NaN and infinite values pass.")
    layers: str | None = option(None, r"Pattern of the block list, e.g. 'blocks\.(\d+)\.'")
    # `Additions` in cards.py, but importing its types would load numpy.
    additions: Callable[[Any], Any] | None = None
    progress: Progress = SILENT

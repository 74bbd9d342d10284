"""The verb `merge`: base and policies in, one complete checkpoint folder for each λ out."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from rewarded_lines.checkpoints.reader import total_bytes
from rewarded_lines.checkpoints.writer import parse_size
from rewarded_lines.errors import Problem, UserError, fail
from rewarded_lines.folders import existing_output
from rewarded_lines.merging.cards import Additions
from rewarded_lines.merging.greedy import greedy_weights
from rewarded_lines.merging.output import command_line, write_folders
from rewarded_lines.merging.provenance import RECORD_FILE
from rewarded_lines.planning.inputs import plan_as
from rewarded_lines.planning.plan import OUTSIDE, Plan, choose
from rewarded_lines.progress import SILENT, Progress
from rewarded_lines.rules.lines import Outside
from rewarded_lines.rules.methods import METHODS, OptionValue
from rewarded_lines.rules.preferences import check_weights, folder_name, parse_weights
from rewarded_lines.rules.spec import MergeSpec

Policies = Mapping[str, str | Path] | Sequence[str | Path | tuple[str, str]]
Weights = float | str | Sequence[float]
Score = str | Callable[[Path], float]


@dataclass(frozen=True)
class MergeResult:
    """One merged policy: where it is (None after a dry run) and what made it."""

    out: Path | None
    spec: MergeSpec
    names: Sequence[str]
    tensors: int
    bytes: int
    scales: Mapping[str, Sequence[float]]
    notes: Sequence[str] = ()


def merge(
    base: str | Path,
    policies: Policies,
    lam: Weights | Sequence[Weights] | None = None,
    *,
    alpha: float | Literal["auto"] = 1.0,
    beta: float = 1.0,
    method: str = "soup",
    options: Mapping[str, OptionValue] | None = None,
    outside: Outside = "alpha",
    score: Score | None = None,
    out: str | Path | None = None,
    dtype: str = "auto",
    device: str = "cpu",
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    dry_run: bool = False,
    layers: str | None = None,
    extrapolate: bool = False,
    allow_nonfinite: bool = False,
    as_: str = "auto",
    additions: Additions | None = None,
    progress: Progress = SILENT,
) -> list[MergeResult]:
    """Merge policies over their SFT base: θ_base + λ^(ℓ)·m(τ_1 … τ_N; λ), streamed block by block.

    τ_i = θ_i − θ_base is the residual of policy i, λ^(ℓ) = α + β·(ℓ−1)/(L−1) the LiNeS scale of block ℓ, and m the
    method, by default Σ λ_i·τ_i.

    Args:
        base: folder or Hub id of the SFT model.
        policies: folders or Hub ids, by name or as a list (named after their folders).
        lam: λ of the first of two policies, or a weight for each; a list of such for several outputs. The default is
            0.5, for a single policy 1.
        alpha: α, the scale of the first block; "auto" chooses (‖Σ τ_i‖₁/‖m‖₁)/N, as LiNeS' authors do.
        beta: β; 0 with α = 1 is plain Rewarded Soups.
        method: a key of `rewarded_lines.rules.methods.METHODS`.
        options: of the method, e.g. {"density": 0.2}.
        outside: what embeddings, final norm and head get: "alpha" gives α, "depth" the scale of the block beside them.
        score: for the method "greedy", a function from a model's folder to a number, `file.py:function`, or a
            command that prints one; higher is better.
        out: the output folder; with several λ each gets a folder `lam=…` in it. The default is
            `merged/lam=…` in the working directory.
        dtype: "auto" (the widest each tensor has in the inputs), "float32", "bfloat16" or "float16".
        device: where the arithmetic runs.
        max_shard_size: the largest weight file, for example "5GB".
        overwrite: replace an output that is there.
        dry_run: do the pre-flight and say what would be written, no more.
        layers: the pattern of the block list, for layouts that are not known.
        extrapolate: allow weights that are negative or do not sum to 1.
        allow_nonfinite: let NaN and infinite values pass.
        as_: what to write: "full" models, LoRA adapters ("adapter"), or "auto": adapters if all policies are adapters.
        additions: what the model cards show beside what the merge knows, see `rewarded_lines.publishing`.
        progress: is told of the steps, and of the bytes that are written.

    Returns:
        One result per λ, in order.

    Raises:
        UserError: every fault of the inputs, before anything is written.
    """
    named = name_policies(policies)
    base = expand(base)
    choose("--outside", outside, OUTSIDE)
    check_schedule(alpha, beta)
    first = MergeSpec((), 0.0 if alpha == "auto" else alpha, beta, method, options or {}, outside).complete(len(named))
    specs = [replace(first, weights=weights) for weights in _weights(lam, method, list(named), extrapolate)]
    shard_size = parse_size(max_shard_size)
    targets = _targets(None if out is None else Path(expand(out)), specs)
    check_targets(targets, [base, *named.values()], overwrite)
    progress.start("opening inputs")
    plan = plan_as(as_, base, named, method, dtype=dtype, device=device, layers=layers)
    addition = additions(plan) if additions else None
    if method == "greedy" and dry_run:
        plan.notes.append("dry run: no candidate is scored, so who joins is not known")
    elif method == "greedy":
        weights = greedy_weights(
            plan,
            specs[0],
            score,
            targets[0],
            automatic=alpha == "auto",
            allow_nonfinite=allow_nonfinite,
            progress=progress,
        )
        specs = [replace(specs[0], weights=weights)]
    if alpha == "auto":
        progress.start("choosing α")
        specs = [replace(spec, alpha=value) for spec, value in zip(specs, plan.auto_alpha(specs), strict=True)]
    if not dry_run:
        progress.start("measuring residuals")
        plan.prepare(specs)
        settings = {
            "as": plan.kind,
            "dtype": dtype,
            "max_shard_size": max_shard_size,
            "layers": layers,
            "command": command_line(),
        }
        write_folders(
            plan,
            specs,
            targets,
            settings,
            max_shard_size=shard_size,
            overwrite=overwrite,
            allow_nonfinite=allow_nonfinite,
            addition=addition,
            progress=progress,
        )
    return [result_of(plan, spec, None if dry_run else target) for spec, target in zip(specs, targets, strict=True)]


def name_policies(policies: Policies) -> dict[str, str]:
    """Return policies by name; in a sequence, pairs are (name, folder) and bare folders give their own names.

    Raises:
        UserError: none was given, or two share a name.
    """
    if isinstance(policies, Mapping):
        named = {name: expand(path) for name, path in policies.items()}
    else:
        pairs = [item if isinstance(item, tuple) else (Path(item).name, item) for item in policies]
        named = {name: expand(path) for name, path in pairs}
    if not named:
        raise fail("no policy given", where="--policy", expected="at least one, as NAME=FOLDER or FOLDER")
    if len(named) < len(policies):
        names = ", ".join(named)
        raise fail("two policies share a name", where="--policy", got=names, remedy="name them: NAME=FOLDER")
    return named


def check_schedule(alpha: float | Literal["auto"], beta: float) -> None:
    """Refuse a schedule of numbers that are none.

    Raises:
        UserError: naming the option.
    """
    given = {"--beta": beta} if alpha == "auto" else {"--alpha": alpha, "--beta": beta}
    problems = [
        Problem("not a finite number", where=option, got=str(value))
        for option, value in given.items()
        if not math.isfinite(value)
    ]
    if problems:
        raise UserError(problems)


def result_of(plan: Plan, spec: MergeSpec, out: Path | None) -> MergeResult:
    """Return what there is to say of one output."""
    outputs = plan.outputs(spec)
    return MergeResult(
        out, spec, tuple(plan.policies), len(outputs), total_bytes(outputs), plan.scales(spec), tuple(plan.notes)
    )


def expand(reference: str | Path) -> str:
    """Return a path as text, `~` replaced: the shell leaves it alone after `--base=` and `NAME=`."""
    return str(Path(reference).expanduser()) if str(reference).startswith("~") else str(reference)


def _weights(
    lam: Weights | Sequence[Weights] | None, method: str, names: Sequence[str], extrapolate: bool
) -> list[tuple[float, ...]]:
    """Return the weights of every output, as the method takes them."""
    kind = METHODS[method].weights
    if kind == "none":
        if lam is not None:
            raise fail(
                f"the method {method} sets the weights itself", where="--lam", got=str(lam), remedy="leave it out"
            )
        return [(1 / len(names),) * len(names)]
    default: Weights = 1.0 if len(names) == 1 else 0.5
    free = extrapolate or kind == "free"
    return _each_weights(default if lam is None else lam, names, free, total=kind == "simplex")


def _each_weights(
    lam: Weights | Sequence[Weights], names: Sequence[str], free: bool, total: bool
) -> list[tuple[float, ...]]:
    if isinstance(lam, float | int | str):
        return [parse_weights(str(lam), names, free, total)]
    if all(isinstance(value, float | int) for value in lam):
        return [check_weights([float(value) for value in lam], names, free, total=total)]  # type: ignore[arg-type]
    found = [_each_weights(value, names, free, total)[0] for value in lam]
    if len(set(found)) < len(found):
        raise fail("the same λ twice", where="--lam", got=", ".join(map(str, found)))
    return found


def _targets(out: Path | None, specs: Sequence[MergeSpec]) -> list[Path]:
    parent = Path("merged") if out is None else out
    if out is not None and len(specs) == 1:
        return [parent]
    if METHODS[specs[0].method].weights == "none":
        return [parent / specs[0].method]
    return [parent / folder_name(spec.weights) for spec in specs]


def check_targets(targets: Sequence[Path], inputs: Sequence[str], overwrite: bool) -> None:
    """Refuse outputs that exist, or that lie in, on or around an input.

    Raises:
        UserError: with all of them.
    """
    problems = [problem for target in targets for problem in existing_output(target, overwrite, RECORD_FILE)]
    problems += [
        Problem("two outputs would have the same name", str(target), remedy="name λ that differ in six digits")
        for target in dict.fromkeys(target for target in targets if targets.count(target) > 1)
    ]
    read = [Path(reference).resolve() for reference in inputs if Path(reference).exists()]
    for target in targets:
        # Not Path.resolve, which fails in its own way on links that go round.
        place = Path(os.path.realpath(target))
        touched = [path for path in read if path == place or place in path.parents or path in place.parents]
        problems += [
            Problem("the output lies in, on or around an input", where=str(target), got=str(path)) for path in touched
        ]
    if problems:
        raise UserError(problems)

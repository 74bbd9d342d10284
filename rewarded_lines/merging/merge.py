"""The verb `merge`: base and policies in, one complete checkpoint folder for each λ out."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rewarded_lines.checkpoints.reader import total_bytes
from rewarded_lines.checkpoints.writer import CheckpointWriter, parse_size
from rewarded_lines.errors import Problem, UserError, fail
from rewarded_lines.folders import atomic_folder, existing_output
from rewarded_lines.merging.plan import MergePlan, MergeSpec, check_method, plan_merge
from rewarded_lines.merging.preferences import check_weights, folder_name, parse_weights
from rewarded_lines.merging.provenance import describe, hash_inputs, model_card

# What a checkpoint needs beside its weights; everything else in the base's folder stays there.
_COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "*.model",
)

Policies = Mapping[str, str | Path] | Sequence[str | Path | tuple[str, str]]
Weights = float | str | Sequence[float]
# Called with a tensor's name, its bytes and the bytes of all tensors together.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class MergeResult:
    """One merged policy: where it is (None after a dry run) and what made it."""

    out: Path | None
    spec: MergeSpec
    tensors: int
    bytes: int
    scales: Sequence[float]


def merge(
    base: str | Path,
    policies: Policies,
    lam: Weights | Sequence[Weights] = 0.5,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    method: str = "soup",
    out: str | Path | None = None,
    dtype: str = "auto",
    device: str = "cpu",
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    dry_run: bool = False,
    layers: str | None = None,
    extrapolate: bool = False,
    progress: Progress | None = None,
) -> list[MergeResult]:
    """Merge policies over their SFT base: θ_base + λ^(ℓ)·Σ λ_i·τ_i, streamed tensor by tensor.

    τ_i = θ_i − θ_base is the residual of policy i and λ^(ℓ) = α + β·(ℓ−1)/(L−1) the LiNeS scale of block ℓ.

    Args:
        base: folder or Hub id of the SFT model.
        policies: folders or Hub ids, by name or as a list (named after their folders).
        lam: λ of the first of two policies, or a weight for each; a list of such for several outputs.
        alpha: α, the scale of the first block and of tensors outside the blocks.
        beta: β; 0 with α = 1 is plain Rewarded Soups.
        method: how residuals are joined; "soup" is the weighted sum.
        out: the output folder; with several λ each gets a folder `lam=…` in it. The default is
            `merged/lam=…` in the working directory.
        dtype: "auto" (the widest each tensor has in the inputs), "float32", "bfloat16" or "float16".
        device: where the arithmetic runs.
        max_shard_size: the largest weight file, for example "5GB".
        overwrite: replace an output that is there.
        dry_run: do the pre-flight and say what would be written, no more.
        layers: the pattern of the block list, for layouts that are not known.
        extrapolate: allow weights that are negative or do not sum to 1.
        progress: called after each tensor with its name, its bytes and the bytes of all.

    Returns:
        One result per λ, in order.

    Raises:
        UserError: every fault of the inputs, before anything is written.
    """
    named = name_policies(policies)
    base = _expand(base)
    out = None if out is None else _expand(out)
    specs = [MergeSpec(weights, alpha, beta, method) for weights in _each_weights(lam, list(named), extrapolate)]
    check_method(method)
    shard_size = parse_size(max_shard_size)
    targets = _targets(out, specs)
    _check_targets(targets, [base, *named.values()], overwrite)
    plan = plan_merge(base, named, dtype=dtype, device=device, layers=layers)
    if not dry_run:
        _write(plan, specs, targets, shard_size, overwrite, progress or (lambda name, size, total: None))
    outputs = plan.outputs()
    return [
        MergeResult(None if dry_run else target, spec, len(outputs), total_bytes(outputs), plan.scales(spec))
        for target, spec in zip(targets, specs, strict=True)
    ]


def name_policies(policies: Policies) -> dict[str, str]:
    """Return policies by name; in a sequence, pairs are (name, folder) and bare folders give their own names.

    Raises:
        UserError: none was given, or two share a name.
    """
    if isinstance(policies, Mapping):
        named = {name: _expand(path) for name, path in policies.items()}
    else:
        pairs = [item if isinstance(item, tuple) else (Path(item).name, item) for item in policies]
        named = {name: _expand(path) for name, path in pairs}
    if not named:
        raise fail("no policy given", where="--policy", expected="at least one, as NAME=FOLDER or FOLDER")
    if len(named) < len(policies):
        names = ", ".join(named)
        raise fail("two policies share a name", where="--policy", got=names, remedy="name them: NAME=FOLDER")
    return named


def _expand(reference: str | Path) -> str:
    """Return a path as text, `~` replaced: the shell leaves it alone after `--base=` and `NAME=`."""
    return str(Path(reference).expanduser()) if str(reference).startswith("~") else str(reference)


def _each_weights(lam: Weights | Sequence[Weights], names: Sequence[str], extrapolate: bool) -> list[tuple[float, ...]]:
    if isinstance(lam, float | int | str):
        return [parse_weights(str(lam), names, extrapolate)]
    if all(isinstance(value, float | int) for value in lam):
        return [check_weights([float(value) for value in lam], names, extrapolate)]  # type: ignore[arg-type]
    found = [_each_weights(value, names, extrapolate)[0] for value in lam]
    if len(set(found)) < len(found):
        raise fail("the same λ twice", where="--lam", got=", ".join(map(str, found)))
    return found


def _targets(out: str | Path | None, specs: Sequence[MergeSpec]) -> list[Path]:
    parent = Path("merged") if out is None else Path(out)
    if out is not None and len(specs) == 1:
        return [parent]
    return [parent / folder_name(spec.weights) for spec in specs]


def _check_targets(targets: Sequence[Path], inputs: Sequence[str], overwrite: bool) -> None:
    problems = [problem for target in targets for problem in existing_output(target, overwrite)]
    read = [Path(reference).resolve() for reference in inputs if Path(reference).exists()]
    for target in targets:
        place = target.resolve()
        touched = [path for path in read if path == place or place in path.parents or path in place.parents]
        problems += [
            Problem("the output lies in, on or around an input", where=str(target), got=str(path)) for path in touched
        ]
    if problems:
        raise UserError(problems)


def _write(
    plan: MergePlan,
    specs: Sequence[MergeSpec],
    targets: Sequence[Path],
    shard_size: int,
    overwrite: bool,
    progress: Progress,
) -> None:
    inputs = hash_inputs(plan)
    outputs = plan.outputs()
    with ExitStack() as stack:
        folders = [stack.enter_context(atomic_folder(target, overwrite)) for target in targets]
        _check_space(folders[0], total_bytes(outputs) * len(folders))
        writers = [CheckpointWriter(folder, outputs, shard_size) for folder in folders]
        for name in writers[0].order:
            for writer, tensor in zip(writers, plan.merged(name, specs), strict=True):
                writer.write(name, tensor)
            progress(name, total_bytes([plan.base.tensors[name]]), total_bytes(plan.base.tensors.values()))
        for writer, folder, spec in zip(writers, folders, specs, strict=True):
            writer.close()
            _write_companions(plan, folder)
            record = describe(plan, spec, inputs, sys.argv)
            (folder / "merge.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
            (folder / "README.md").write_text(model_card(plan, spec), encoding="utf-8")


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise fail(
            "not enough disk space",
            where=str(folder.parent),
            expected=f"{needed / 1e9:.1f} GB free",
            got=f"{free / 1e9:.1f} GB",
            remedy="choose another --out, fewer λ, or --dtype bfloat16",
        )


def _write_companions(plan: MergePlan, folder: Path) -> None:
    source = plan.base.folder
    for path in sorted({path for pattern in _COMPANIONS for path in source.glob(pattern) if path.is_file()}):
        shutil.copyfile(path, folder / path.name)
    config: dict[str, Any] = dict(plan.base.config)
    # Whoever loads with the type that the config names must get every bit that was written.
    config.pop("torch_dtype", None)
    config["dtype"] = plan.widest_dtype()
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

"""`merge --from-mergekit`: read a mergekit YAML, translate it into arguments of `merge`, and merge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rewarded_lines.errors import Problem, UserError, did_you_mean, fail
from rewarded_lines.merger.merge import merge
from rewarded_lines.merger.merge_outputs import MergeResult
from rewarded_lines.merger.mergekit_file import TOP_KEYS, MergekitFile, Reference, read_file
from rewarded_lines.merger.mergekit_methods import MERGEKIT_METHODS, MergekitMethod, Translation


def read_mergekit(path: str | Path, *, base: str | None = None, seed: int | None = None) -> Translation:
    """Return the arguments of `merge` that make the merge of a mergekit YAML.

    Args:
        path: the file; folders in it are relative to the working directory, as in mergekit.
        base: the SFT model, for a `linear` merge whose file names none.
        seed: of DARE's masks.

    Raises:
        UserError: with everything in the file that has no exact counterpart here.
    """
    file = read_file(Path(path).expanduser())
    row = MERGEKIT_METHODS.get(file.method)
    if row is None:
        remedy = did_you_mean(file.method, MERGEKIT_METHODS, "stay with mergekit for this merge")
        if file.method == "slerp":
            remedy = "use nuslerp with `base_model: SFT model`; mergekit's slerp rotates whole weights, not residuals"
        what, known = f"the method `{file.method}` has no exact counterpart here", ", ".join(MERGEKIT_METHODS)
        raise file.fault(what, "merge_method", expected=known, remedy=remedy)
    _check_parameters(file, row)
    _check_base(file, base)
    if seed is not None and not file.method.startswith("dare"):
        expected = "a file with dare_linear or dare_ties"
        raise fail("nothing is drawn at random", where="--seed", got=str(seed), expected=expected)
    found = row.translate(replace(file, base=Reference(base)) if base else file)
    options = found.merge.options
    if seed is None or "seed" not in options:
        return found
    return replace(found, merge=replace(found.merge, options={**options, "seed": seed}))


def merge_like_mergekit(
    path: str | Path, *, base: str | None = None, seed: int | None = None, dry_run: bool = False, **how: Any
) -> tuple[Translation, list[MergeResult]]:
    """Make the merge of a mergekit YAML; see `read_mergekit` for path, base and seed.

    `how` are arguments of `merge` for writing: out, device, max_shard_size, overwrite, layers, tokenizer, progress ...

    Raises:
        UserError: a fault that `read_mergekit` or `merge` refuses, or a number of blocks for which the tools differ.
    """
    asked = read_mergekit(path, base=base, seed=seed)
    spec = asked.merge
    arguments = {
        **spec.schedule.as_dict(list(asked.policies)),
        **{"method": spec.method, "options": spec.options},
        **{"dtype": asked.dtype, "as_": "full", "extrapolate": spec.extrapolates, **how},
    }
    if how.get("tokenizer", "auto") == "auto":
        arguments["tokenizer"] = asked.tokenizer
    checked = merge(asked.base, asked.policies, spec.weights, dry_run=True, **arguments)
    _check_blocks(str(path), asked, checked[0].scales)
    return asked, checked if dry_run else merge(asked.base, asked.policies, spec.weights, **arguments)


def _check_parameters(file: MergekitFile, row: MergekitMethod) -> None:
    """Refuse parameters that the method does not have, or that mergekit ignores at their place."""
    problems = []
    levels = [(f"{file.path}: parameters", level, (*row.shared, *row.beside, *row.idle)) for level in file.shared]
    levels += [(f"{file.path}: {one.model}", one.parameters, (*row.beside, *row.idle)) for one in file.inputs]
    for where, parameters, known in levels:
        for name in [name for name in parameters if name not in known]:
            what, remedy = f"{file.method} has no parameter `{name}`", did_you_mean(str(name), known)
            if name in row.shared:
                what, remedy = f"mergekit ignores `{name}` here", "move it to the top level's `parameters:`"
            if name in TOP_KEYS:
                what, remedy = f"mergekit ignores `{name}` here", "move it to the top level, beside `merge_method:`"
            problems.append(Problem(what, where, expected=", ".join(known), remedy=remedy))
    if problems:
        raise UserError(problems)


def _check_base(file: MergekitFile, base: str | None) -> None:
    if file.method != "linear" and file.base is None:
        raise file.fault(f"no `base_model`, which {file.method} needs", expected="base_model: SFT model")
    if base is not None and file.base is not None:
        raise fail("the file names the base", where="--base", got=base, remedy="leave --base out")
    if file.method == "linear" and file.base and file.base not in [one.model for one in file.inputs]:
        raise file.fault(
            "linear sums models, and mergekit adds `base_model` to them",
            "base_model",
            expected="none, or one of the models, with its weight",
            remedy=f"take `base_model` out, and pass --base {file.base.path}",
        )


def _check_blocks(path: str, asked: Translation, scales: Mapping[str, Sequence[float]]) -> None:
    """Refuse a slice or gradient that does not fit the models' number of blocks."""
    for stack, blocks in scales.items():
        if asked.blocks is not None and len(blocks) != asked.blocks:
            expected = f"layer_range: [0, {len(blocks)}] ({stack})"
            what, where = "the slice is not the whole model", f"{path}: slices"
            raise fail(what, where=where, expected=expected, got=f"[0, {asked.blocks}]")
        if asked.merge.beta and len(blocks) == 1:
            what = "with a single block mergekit takes the last value of a gradient, α + β; LiNeS takes α"
            raise fail(what, where=path, expected="numbers in place of lists", got=f"one block ({stack})")

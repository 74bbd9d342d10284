"""`merge --from-mergekit`: read a mergekit YAML, translate it into arguments of `merge`, and merge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rewarded_lines.errors import Problem, UserError, did_you_mean, fail
from rewarded_lines.merger.merge import MergeResult, merge
from rewarded_lines.merger.mergekit_file import MergekitFile, read_file
from rewarded_lines.merger.mergekit_methods import MERGEKIT_METHODS, MergekitMethod, Translation


def read_mergekit(path: str | Path, *, base: str | None = None, seed: int | None = None) -> Translation:
    """Return what a mergekit YAML asks for, in the terms of `merge`.

    Args:
        path: the file; folders in it are relative to the working directory, as mergekit has them.
        base: the SFT model, for a `linear` merge whose file names none.
        seed: of DARE's masks.

    Raises:
        UserError: with everything in the file that has no exact counterpart here.
    """
    file = read_file(Path(path).expanduser())
    row = MERGEKIT_METHODS.get(file.method)
    if row is None:
        raise _unknown_method(file)
    _check_parameters(file, row)
    if file.method != "linear" and file.base is None:
        raise fail(f"no `base_model`, which {file.method} needs", where=file.path, expected="base_model: SFT model")
    if base is not None and file.base is not None:
        raise fail("the file names the base", where="--base", got=base, remedy="leave --base out")
    if seed is not None and not file.method.startswith("dare"):
        raise fail(
            "nothing is drawn at random", where="--seed", got=str(seed), expected="a file with dare_linear or dare_ties"
        )
    return row.translate(file, base, seed)


def merge_like_mergekit(
    path: str | Path, *, base: str | None = None, seed: int | None = None, dry_run: bool = False, **how: Any
) -> tuple[Translation, list[MergeResult]]:
    """Make the merge that a mergekit YAML asks for.

    Args:
        path: the file.
        base: see `read_mergekit`.
        seed: see `read_mergekit`.
        dry_run: check everything and write nothing.
        how: what `merge` takes that says how to write: out, device, max_shard_size, overwrite, layers, progress ...

    Raises:
        UserError: what `read_mergekit` and `merge` refuse, or a number of blocks for which the two tools differ.
    """
    asked = read_mergekit(path, base=base, seed=seed)
    spec = asked.merge
    arguments = {
        "alpha": spec.alpha,
        "beta": spec.beta,
        "method": spec.method,
        "options": spec.options,
        "dtype": asked.dtype,
        "as_": "full",
        "extrapolate": spec.extrapolates,
        **how,
    }
    checked = merge(asked.base, asked.policies, spec.weights, dry_run=True, **arguments)
    _check_blocks(str(path), asked, checked[0].scales)
    if dry_run:
        return asked, checked
    return asked, merge(asked.base, asked.policies, spec.weights, **arguments)


def _unknown_method(file: MergekitFile) -> UserError:
    known = ", ".join(MERGEKIT_METHODS)
    where = f"{file.path}: merge_method"
    if file.method == "slerp":
        return fail(
            "mergekit's slerp turns whole weights around the origin; here residuals turn around the base",
            where=where,
            expected=known,
            got="slerp",
            remedy="nuslerp with `base_model: SFT model` is the one that both have",
        )
    return fail(
        f"the method `{file.method}` has no exact counterpart here",
        where=where,
        expected=known,
        remedy=did_you_mean(file.method, MERGEKIT_METHODS, "stay with mergekit for this merge"),
    )


def _check_parameters(file: MergekitFile, row: MergekitMethod) -> None:
    """Refuse parameters that the method does not have, or that mergekit ignores where they stand."""
    problems = []
    levels = [(f"{file.path}: parameters", level, (*row.shared, *row.beside, *row.idle)) for level in file.shared]
    levels += [(one.where, one.parameters, (*row.beside, *row.idle)) for one in file.inputs]
    for where, parameters, known in levels:
        for name in parameters:
            if name in known:
                continue
            overlooked = name in row.shared
            what = f"mergekit overlooks `{name}` here" if overlooked else f"{file.method} has no parameter `{name}`"
            remedy = "move it to the top level's `parameters:`" if overlooked else did_you_mean(str(name), known)
            problems.append(Problem(what, where, expected=", ".join(known), remedy=remedy))
    if problems:
        raise UserError(problems)


def _check_blocks(path: str, asked: Translation, scales: Mapping[str, Sequence[float]]) -> None:
    """Refuse a file whose slice or gradient does not fit the models' number of blocks."""
    for stack, blocks in scales.items():
        if asked.blocks is not None and len(blocks) != asked.blocks:
            raise fail(
                "the slice is not the whole model",
                where=f"{path}: slices",
                expected=f"layer_range: [0, {len(blocks)}] ({stack})",
                got=f"[0, {asked.blocks}]",
            )
        if asked.merge.beta and len(blocks) == 1:
            raise fail(
                "with a single block mergekit takes the last value of a gradient, α + β; LiNeS takes α",
                where=path,
                expected="numbers in place of lists",
                got=f"one block ({stack})",
            )

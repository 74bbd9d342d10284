"""Pre-flight for whole models: finds every fault that prevents their merge, before a byte is written."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import blake3
import numpy as np

from rewarded_lines.checkpoints.block_counts import of_text
from rewarded_lines.checkpoints.dtypes import as_float64
from rewarded_lines.checkpoints.families import HEADS, TOKEN_EMBEDDINGS
from rewarded_lines.checkpoints.hashing import weights_hash
from rewarded_lines.checkpoints.headers import TensorInfo
from rewarded_lines.checkpoints.missing_weights import UNGATHERED
from rewarded_lines.checkpoints.reader import Checkpoint, read_json_object
from rewarded_lines.errors import Problem, UserError, few, listed
from rewarded_lines.folders import TRAINING_FILE
from rewarded_lines.kernels.blocks import blocks_of
from rewarded_lines.merger.config_checks import REMEDY, compare_configs, cut, resize

SHOWN = 3
# Fine-tuning changes weights little (cosine above .9, even after long training); runs from different
# initialisations are orthogonal.
_LEAST_COSINE = 0.5
_SAMPLED_TENSORS = 8
_SAMPLED_VALUES = 65_536
# The critic's head of PPO, which trainers save with a policy.
_VALUE_HEAD = re.compile(r"(v_head|value_head|value_model)\.")
# Constants that only some versions of transformers write: masks, positions, rotary frequencies.
_CONSTANT = re.compile(r"(^|\.)(rotary_emb\.inv_freq|masked_bias|position_ids)$")
_CAUSAL_MASK = re.compile(r"\.(attn|attention)\.bias$")


def check(base: Checkpoint, policies: Mapping[str, Checkpoint]) -> tuple[list[str], list[str]]:
    """Return the tensors that all inputs share, in the base's order, and notes on the others.

    Value heads, constants that some inputs lack, and second copies of tied embeddings are left out, with a note.

    Raises:
        UserError: every difference in architecture, tensor names, shapes, types, vocabulary, tokenizer and origin.
    """
    extra = _left_out(base, policies)
    problems = [problem for name, policy in policies.items() for problem in _compare(base, policy, name, set(extra))]
    if problems:
        raise UserError(problems)
    notes = [f"left out: {name}, {reason}" for name, reason in list(extra.items())[:SHOWN]]
    if len(extra) > SHOWN:
        notes.append(f"left out: {len(extra) - SHOWN} more tensors likewise")
    notes += [_unchanged(name, policy) for name, policy in policies.items() if _equal(base, policy)]
    return [name for name in base.tensors if name not in extra], notes


def _unchanged(name: str, policy: Checkpoint) -> str:
    """Return the note on a policy that equals the base: verl's model_merger writes the adapter beside the base."""
    beside = next(policy.folder.glob("*/adapter_model.safetensors"), None)
    hint = f"; an adapter lies in {beside.parent}" if beside else ""
    return f"policy `{name}` has the base's own values, so it changes nothing{hint}"


def _equal(base: Checkpoint, policy: Checkpoint) -> bool:
    """Return whether all tensors that two checkpoints share are equal; it ends at the first that differs."""
    shared = [(info, policy.tensors[name]) for name, info in base.tensors.items() if name in policy.tensors]
    return all(
        np.array_equal(as_float64(base.read(one.name, *block)), as_float64(policy.read(other.name, *block)))
        for one, other in shared
        if one.dtype.floating and other.dtype.floating
        for block in blocks_of(one.elements)
    )


def _left_out(base: Checkpoint, policies: Mapping[str, Checkpoint]) -> dict[str, str]:
    """Return the tensors that are not merged, with reasons."""
    inputs = [base, *policies.values()]
    names = dict.fromkeys(name for source in inputs for name in source.tensors)
    partial = [name for name in names if not all(name in source.tensors for source in inputs)]
    reasons = {}
    for name in partial:
        holder = next(source for source in inputs if name in source.tensors)
        if _VALUE_HEAD.match(name) and name not in base.tensors:
            reasons[name] = f"the value head of {holder.name}"
        elif _CONSTANT.search(name) or (_CAUSAL_MASK.search(name) and len(holder.tensors[name].shape) == 4):
            reasons[name] = "a constant that not all inputs hold"
    # An untied model needs its own head, so a head that some inputs lack counts as no copy.
    # If the config has no `tie_word_embeddings`, transformers ties the head to the embeddings.
    tied = of_text(base.config, "tie_word_embeddings") is not False
    considered = names if tied else [name for name in partial if not is_head(name)]
    copies = _copies(inputs, [name for name in considered if name not in reasons])
    return reasons | {name: f"tied to {copies[name]}" for name in considered if name in copies}


def is_head(name: str) -> bool:
    """True if a tensor is of a module that a task adds after the blocks."""
    return any(name.startswith(f"{head}.") for head in HEADS)


def _vocabulary(source: Checkpoint) -> Any:
    """Return the number of tokens; the config of a text model inside another leaves out its class's defaults."""
    rows = (
        info.shape[0]
        for info in source.tensors.values()
        if len(info.shape) == 2 and info.name.removesuffix(".weight").rpartition(".")[2] in TOKEN_EMBEDDINGS
    )
    given = of_text(source.config, "vocab_size")
    return next(rows, None) if given is None and "text_config" in source.config else given


def _copies(inputs: Sequence[Checkpoint], names: Iterable[str]) -> dict[str, str]:
    """Return the tensors among `names` that repeat another one byte for byte, with the one that is kept.

    Only matrices with a row for every token are compared, in the inputs that have the tensor, and with tensors that
    all inputs have. The first copy that is no head is kept: engines ignore the head of a tied model. Comparing digests
    takes time proportional to the number of tensors, not of pairs.
    """

    @cache
    def digest(row: int, name: str) -> bytes:
        info = inputs[row].tensors[name]
        hashed = blake3.blake3(info.dtype.name.encode())
        for block in blocks_of(info.elements):
            hashed.update(inputs[row].read(name, *block).view(np.uint8).data)
        return hashed.digest()

    groups: dict[tuple[tuple[int, ...], tuple[int, ...]], list[str]] = {}
    for name in names:
        holders = tuple(row for row, source in enumerate(inputs) if name in source.tensors)
        first = inputs[holders[0]]
        shape = first.tensors[name].shape
        if len(shape) == 2 and shape[0] == _vocabulary(first):
            groups.setdefault((holders, shape), []).append(name)
    found: dict[str, str] = {}
    for (holders, shape), members in groups.items():
        alike = [info.name for info in inputs[holders[0]].tensors.values() if info.shape == shape]
        alike = sorted((name for name in alike if all(name in source.tensors for source in inputs)), key=is_head)
        # A tensor without a candidate need not be read.
        if not alike or len({*members, *alike}) == 1:
            continue
        # Backwards, so that the first of several equal ones is kept.
        stays = {tuple(digest(row, name) for row in holders): name for name in reversed(alike)}
        keys = {name: tuple(digest(row, name) for row in holders) for name in members}
        found |= {name: stays[key] for name, key in keys.items() if stays.get(key, name) != name}
    return found


def _compare(base: Checkpoint, policy: Checkpoint, name: str, extra: set[str]) -> list[Problem]:
    where = f"policy `{name}` ({policy.folder})"
    settings = compare_configs(base.config, policy.config, where)
    if heads := _new_heads(base, policy, extra):
        # That the class is another one follows from the head.
        settings = [problem for problem in settings if "`architectures`" not in problem.what]
    structure = [
        *settings,
        *_compare_names(base, policy, where, extra, heads),
        *_compare_tensors(base, policy, name, extra),
    ]
    return structure or _compare_origin(base, policy, where)


def _new_heads(base: Checkpoint, policy: Checkpoint, extra: set[str]) -> list[TensorInfo]:
    """Return the heads that only the policy has, if they are all that it has more than the base."""
    added = [info for name, info in policy.tensors.items() if name not in base.tensors and name not in extra]
    return added if all(is_head(info.name) for info in added) else []


def with_head(kind: str, head: TensorInfo) -> str:
    """Return the remedy for a base without the policies' head; `kind` is the class that has it."""
    labels = f", num_labels={head.shape[0]}" if "Classification" in kind and len(head.shape) == 2 else ""
    return (
        f"give as base {kind}.from_pretrained(base{labels}), saved; its head counts as the one from which the policies "
        "started"
    )


def _compare_names(
    base: Checkpoint, policy: Checkpoint, where: str, extra: set[str], heads: Sequence[TensorInfo]
) -> list[Problem]:
    missing = [name for name in base.tensors if name not in policy.tensors and name not in extra]
    added = [name for name in policy.tensors if name not in base.tensors and name not in extra]
    remedy = REMEDY
    if heads:
        kinds = policy.config.get("architectures")
        remedy = with_head(str(kinds[0]) if isinstance(kinds, list) and kinds else "MODEL_CLASS", heads[0])
        missing = [name for name in missing if not is_head(name)]
    rows = (("tensors of the base are missing", missing, REMEDY), ("tensors are not in the base", added, remedy))
    return [Problem(f"{len(names)} {what}", where, got=some(names), remedy=said) for what, names, said in rows if names]


def _compare_tensors(base: Checkpoint, policy: Checkpoint, name: str, extra: set[str]) -> list[Problem]:
    problems: list[Problem] = []
    for tensor in [tensor for tensor in base.tensors if tensor in policy.tensors and tensor not in extra]:
        info, other = base.tensors[tensor], policy.tensors[tensor]
        if info.shape != other.shape:
            what = f"shape {info.shape} in base, {other.shape} in {name}"
            rows = _vocabulary(base)
            resized = info.shape[:1] == (rows,) and info.shape[1:] == other.shape[1:]
            remedy = resize(other.shape[0]) if resized else REMEDY if other.elements else UNGATHERED
            problems.append(Problem(what, where=tensor, remedy=remedy))
        elif not info.dtype.floating or not other.dtype.floating:
            problems += _compare_buffers(base, policy, info, other, name)
    return few(problems, f"policy `{name}`", SHOWN, "more tensors differ likewise")


def _compare_buffers(
    base: Checkpoint, policy: Checkpoint, info: TensorInfo, other: TensorInfo, name: str
) -> list[Problem]:
    """Compare integers and booleans (position ids, masks): they are copied, so they must be equal."""
    # In blocks: a sparse file may declare more than memory holds.
    pieces = ((base.read(info.name, *piece), policy.read(info.name, *piece)) for piece in blocks_of(info.elements))
    if info.dtype == other.dtype and all(np.array_equal(*pair) for pair in pieces):
        return []
    what = f"a buffer of type {info.dtype.torch} that is not the same in base and {name}"
    return [Problem(what, where=info.name, expected="equal values in all inputs", remedy=REMEDY)]


def _compare_origin(base: Checkpoint, policy: Checkpoint, where: str) -> list[Problem]:
    """Find policies of another base by the hash in their training.json or, without one, by their values."""
    if recorded := recorded_base(policy.folder):
        remedy = f"{REMEDY}; a base saved anew, in other shards for example, needs its policies' first files"
        return compare_hashes(base.folder, recorded, TRAINING_FILE, where, remedy)
    cosine = sampled_cosine(base, policy)
    if cosine >= _LEAST_COSINE:
        return []
    what = "the weights have nothing to do with the base's"
    return [Problem(what, where, f"cosine ≥ {_LEAST_COSINE}", f"{cosine:.3f} over a sample", REMEDY)]


def recorded_base(folder: Path) -> str:
    """Return the hash of the base's weights that a policy's training.json records, or "".

    For a base of the Hub, earlier versions recorded its id, which does not tell the weights.
    """
    path = folder / TRAINING_FILE
    recorded = str((read_json_object(path) if os.path.lexists(path) else {}).get("base_hash") or "")
    return recorded if "/" not in recorded else ""


def compare_hashes(base: Path, theirs: str, source: str, where: str, remedy: str = REMEDY) -> list[Problem]:
    """Compare a base's weights with the hash of a policy's base, which is from `source`."""
    actual = weights_hash(base)
    if theirs == actual:
        return []
    expected, got = f"base weights {actual[:12]}… ({base})", f"{theirs[:12]}… ({source})"
    return [Problem("trained from another base", where, expected, got, remedy)]


# The merge itself reports values that are not finite, so numpy's warnings are off.
@np.errstate(all="ignore")
def sampled_cosine(first: Checkpoint, second: Checkpoint) -> float:
    """Return the cosine between the leading values of some matrices of two checkpoints; 1 without any."""
    # A policy may hold tensors of its base, which say nothing.
    pairs = [(info, second.tensors[info.name]) for info in first.tensors.values() if info.name in second.tensors]
    shared = [info for info, other in pairs if info is not other]
    matrices = [info for info in shared if len(info.shape) > 1 and info.dtype.floating]
    dot = square_first = square_second = 0.0
    for info in matrices[:: max(1, len(matrices) // _SAMPLED_TENSORS)]:
        count = min(info.elements, _SAMPLED_VALUES)
        one = as_float64(first.read(info.name, count=count))
        two = as_float64(second.read(info.name, count=count))
        dot += float((one * two).sum())
        square_first += float((one * one).sum())
        square_second += float((two * two).sum())
    norm = math.sqrt(square_first * square_second)
    return dot / norm if 0 < norm < math.inf else 1.0


def some(names: Iterable[object]) -> str:
    """Return the first names, shortened, and the number of the others."""
    return listed(list(map(cut, names)), SHOWN)

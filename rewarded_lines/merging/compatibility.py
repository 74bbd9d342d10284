"""Pre-flight: everything that keeps checkpoints from being merged, found before a byte is written, told at once."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rewarded_lines.checkpoints.hashing import weights_hash
from rewarded_lines.checkpoints.reader import Checkpoint, TensorInfo
from rewarded_lines.errors import Problem, UserError

_REMEDY = "merge policies that were all trained from this base"
_SHOWN = 3
# Fine-tuning leaves weights almost where they were (cosine above .9, even after long training); two runs from
# different initialisations are orthogonal.
_LEAST_COSINE = 0.5
_SAMPLED_TENSORS = 8
_SAMPLED_VALUES = 65_536


def check(base: Checkpoint, policies: Mapping[str, Checkpoint]) -> None:
    """Refuse checkpoints that do not come from one SFT base.

    Raises:
        UserError: every difference in architecture, tensor names, shapes, types, vocabulary, tokenizer and origin.
    """
    problems = [problem for name, policy in policies.items() for problem in _compare(base, policy, name)]
    if problems:
        raise UserError(problems)


def _compare(base: Checkpoint, policy: Checkpoint, name: str) -> list[Problem]:
    where = f"policy `{name}` ({policy.folder})"
    structure = [
        *_compare_configs(base.config, policy.config, where),
        *_compare_names(base, policy, where),
        *_compare_tensors(base, policy, name),
        *_compare_tokenizers(base.folder, policy.folder, where),
    ]
    return structure or _compare_origin(base, policy, where)


def _compare_configs(base: Mapping[str, Any], policy: Mapping[str, Any], where: str) -> list[Problem]:
    return [
        Problem(f"`{key}` differs from the base's", where, str(base.get(key)), str(policy.get(key)), remedy=_REMEDY)
        for key in ("model_type", "architectures", "vocab_size", "num_hidden_layers")
        if base.get(key) != policy.get(key)
    ]


def _compare_names(base: Checkpoint, policy: Checkpoint, where: str) -> list[Problem]:
    missing = [name for name in base.tensors if name not in policy.tensors]
    added = [name for name in policy.tensors if name not in base.tensors]
    rows = (("tensors of the base are missing", missing), ("tensors are not in the base", added))
    return [Problem(f"{len(names)} {what}", where, got=_some(names), remedy=_REMEDY) for what, names in rows if names]


def _compare_tensors(base: Checkpoint, policy: Checkpoint, name: str) -> list[Problem]:
    problems = []
    for tensor, info in base.tensors.items():
        other = policy.tensors.get(tensor)
        if other is None:
            continue
        if info.shape != other.shape:
            what = f"shape {info.shape} in base, {other.shape} in {name}"
            problems.append(Problem(what, where=tensor, remedy=_REMEDY))
        elif not info.dtype.is_floating_point or not other.dtype.is_floating_point:
            problems += _compare_buffers(base, policy, info, other, name)
    rest = len(problems) - _SHOWN
    if rest > 0:
        problems[_SHOWN:] = [Problem(f"{rest} more tensors differ likewise", where=f"policy `{name}`")]
    return problems


def _compare_buffers(
    base: Checkpoint, policy: Checkpoint, info: TensorInfo, other: TensorInfo, name: str
) -> list[Problem]:
    """Integers and booleans (position ids, masks) are copied, so they must be the same everywhere."""
    if info.dtype == other.dtype and torch.equal(base.read(info.name), policy.read(info.name)):
        return []
    what = f"a buffer of type {info.dtype} that is not the same in base and {name}"
    return [Problem(what, where=info.name, expected="equal values in all inputs", remedy=_REMEDY)]


def _compare_tokenizers(base: Path, policy: Path, where: str) -> list[Problem]:
    """Compare vocabularies and merges; padding and truncation settings do not change what a token means."""
    first, second = _read_json(base / "tokenizer.json"), _read_json(policy / "tokenizer.json")
    if not first or not second:
        return []
    parts = [part for part in ("model", "added_tokens", "normalizer") if first.get(part) != second.get(part)]
    if not parts:
        return []
    return [Problem(f"the tokenizer differs from the base's in {', '.join(parts)}", where, remedy=_REMEDY)]


def _compare_origin(base: Checkpoint, policy: Checkpoint, where: str) -> list[Problem]:
    """Tell policies of another base by what their training recorded or, where it recorded nothing, by their values."""
    recorded = _read_json(policy.folder / "training.json").get("base_hash")
    if recorded:
        actual = weights_hash(base.folder)
        if recorded == actual:
            return []
        return [
            Problem(
                "trained from another base",
                where,
                f"base weights {actual[:12]}… ({base.folder})",
                f"{recorded[:12]}… (training.json)",
                _REMEDY + "; a base saved anew, in other shards for example, needs its policies' first files",
            )
        ]
    cosine = sampled_cosine(base, policy)
    if cosine >= _LEAST_COSINE:
        return []
    what = "the weights have nothing to do with the base's"
    return [Problem(what, where, f"cosine ≥ {_LEAST_COSINE}", f"{cosine:.3f} over a sample", _REMEDY)]


def sampled_cosine(first: Checkpoint, second: Checkpoint) -> float:
    """Return the cosine between the leading values of some of the two checkpoints' matrices; 1 when there are none."""
    matrices = [i.name for i in first.tensors.values() if len(i.shape) > 1 and i.dtype.is_floating_point]
    dot = square_first = square_second = 0.0
    for name in matrices[:: max(1, len(matrices) // _SAMPLED_TENSORS)]:
        one = first.read(name).reshape(-1)[:_SAMPLED_VALUES].double()
        two = second.read(name).reshape(-1)[:_SAMPLED_VALUES].double()
        dot += float(one @ two)
        square_first += float(one @ one)
        square_second += float(two @ two)
    norm = math.sqrt(square_first * square_second)
    return dot / norm if norm > 0 else 1.0


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")

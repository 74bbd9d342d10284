"""Pre-flight for adapters: they must come from this base, and fit its matrices and one another."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from rewarded_lines.checkpoints.adapter_config import ADAPTER_CONFIG
from rewarded_lines.checkpoints.adapters import Adapter, BareBase, LowRank
from rewarded_lines.checkpoints.dtypes import as_float64
from rewarded_lines.checkpoints.families import TIED_HEADS, TOKEN_EMBEDDINGS
from rewarded_lines.checkpoints.hashing import weights_hash
from rewarded_lines.checkpoints.headers import TensorInfo
from rewarded_lines.checkpoints.reader import Checkpoint
from rewarded_lines.errors import Problem
from rewarded_lines.folders import TRAINING_FILE
from rewarded_lines.kernels.blocks import blocks_of
from rewarded_lines.merger.lora_folding import is_transposed, stored_shape
from rewarded_lines.merger.model_checks import (
    REMEDY,
    RESIZE,
    compare_hashes,
    few,
    recorded_base,
    some,
)

Base = Checkpoint | BareBase
KEEP_APART = "pass --as adapter, which keeps tied layers apart as PEFT does; or untie them in the base"
_SHOWN = 6
_LONGEST = 200
_OTHER_NAMES = (
    f"{REMEDY}; if transformers names layers differently from the checkpoint (LLaVA, Gemma 3, Qwen2-VL), give as "
    "base a folder with only its config.json"
)
_LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForMaskedLM", "ForPreTraining")


def check_adapters(base: Base, reference: str, adapters: Mapping[str, Adapter], folded: bool) -> list[Problem]:
    """Return every fault that prevents a merge of adapters: `folded` into the base's weights, or into an adapter.

    `reference` is the user's folder or Hub id of the base.
    """
    problems: list[Problem] = []
    for name, adapter in adapters.items():
        where = f"policy `{name}` ({adapter.folder})"
        found = [*_fit(base, adapter, where), *_compare_origin(base, reference, adapter, where)]
        if folded and isinstance(base, Checkpoint):
            found += _fold(base, adapter, where)
        problems += few(found, where, _SHOWN)
    return problems + few([*_agree(adapters, folded), *_same_bases(adapters)], "policies", _SHOWN)


def notes_on(base: Base, adapters: Mapping[str, Adapter]) -> list[str]:
    """Return notes on the tensors that are left out."""
    compared = "equal to the base's" if isinstance(base, Checkpoint) else "not compared, the base has no weights"
    return [
        f"left out: {', '.join(adapter.copies)} in {name}, PEFT's copy of the base's ({compared})"
        for name, adapter in adapters.items()
        if adapter.copies
    ]


def changed_tensors(adapter: Adapter) -> list[str]:
    """Return the base's tensors that an adapter changes."""
    return [module.tensor for module in adapter.modules.values()] + list(adapter.saved)


def _fit(base: Base, adapter: Adapter, where: str) -> list[Problem]:
    """Compare names, shapes and types with the base's tensors."""
    if isinstance(base, BareBase):
        if not adapter.saved:
            return []
        what = f"{len(adapter.saved)} tensors are saved whole (modules_to_save), their residuals need the base's"
        remedy = "give a base with its weights, not quantized"
        return [Problem(what, where, got=some(adapter.saved), remedy=remedy)]
    missing = [name for name, module in adapter.modules.items() if _stored_name(base, module.tensor) is None]
    if missing and len(missing) == len(adapter.modules):
        what = f"none of the adapter's {len(missing)} modules is in the base"
        return [Problem(what, where, got=some(missing), remedy=_OTHER_NAMES)]
    found = [_fit_module(base, adapter, module, where) for module in adapter.modules.values()]
    found += [_fit_whole(base, name, name, info, where) for name, info in adapter.saved.items()]
    found += [_fit_copy(base, adapter, name, info, where) for name, info in adapter.copies.items()]
    return [problem for problem in found if problem]


def _fit_module(base: Checkpoint, adapter: Adapter, module: LowRank, where: str) -> Problem | None:
    stored = _stored_name(base, module.tensor)
    if stored is None:
        return Problem(f"{module.module} is not in the base", where, got=module.tensor, remedy=REMEDY)
    where = f"{where}: {module.tensor}"
    shape, expected = base.tensors[stored].shape, stored_shape(module, base.config)
    if shape != expected:
        remedy = RESIZE if module.embedding or stored != module.tensor else REMEDY
        return Problem(f"shape {shape} in base, {expected} by A and B", where, remedy=remedy)
    if not base.tensors[stored].dtype.floating:
        return Problem("the base's tensor holds no floating-point numbers", where)
    square = shape[0] == shape[1] and not module.embedding
    if adapter.config.fan_in_fan_out and square and not is_transposed(module, base.config):
        what = "this square matrix may be stored as [in, out] or [out, in] (fan_in_fan_out is true)"
        remedy = f"set fan_in_fan_out to false in {ADAPTER_CONFIG} if the layer is an nn.Linear"
        return Problem(what, where, remedy=remedy)
    return None


def _fit_whole(base: Checkpoint, name: str, stored: str | None, info: TensorInfo, where: str) -> Problem | None:
    """Compare a tensor that the adapter stores whole with the base's tensor `stored`."""
    if stored is None or stored not in base.tensors:
        if _stored_name(base, name) is None:
            return Problem(f"{name} is not in the base", where, remedy=REMEDY)
        remedy = "untie them in the base (tie_word_embeddings false), save it, and train from that"
        return Problem(f"{name} is tied to the embeddings in the base", where, remedy=remedy)
    theirs, where = base.tensors[stored], f"{where}: {name}"
    if theirs.shape != info.shape:
        return Problem(f"shape {theirs.shape} in base, {info.shape} in the adapter", where, remedy=RESIZE)
    if not (theirs.dtype.floating and info.dtype.floating):
        return Problem("only floating-point tensors are merged", where, got=info.dtype.torch)
    return None


def _fit_copy(base: Checkpoint, adapter: Adapter, name: str, info: TensorInfo, where: str) -> Problem | None:
    """Compare the adapter's copy of a base tensor with the base's: shape, type and every value."""
    stored = _stored_name(base, name)
    if (problem := _fit_whole(base, name, stored, info, where)) or stored is None:
        return problem
    theirs = base.tensors[stored]
    for start, count in blocks_of(theirs.elements):
        first = as_float64(base.read(theirs.name, start, count), theirs.dtype)
        if not np.array_equal(first, as_float64(adapter.read(info.name, start, count), info.dtype), equal_nan=True):
            what = "the adapter's copy of a base tensor differs from the base's"
            return Problem(what, f"{where}: {name}", remedy=REMEDY)
    return None


def _stored_name(base: Checkpoint, name: str) -> str | None:
    """Return the base's tensor for a name; a head without a tensor is tied to the embeddings."""
    if name in base.tensors:
        return name
    if name not in TIED_HEADS or not _is_tied(base):
        return None
    ends = tuple(f".{end}.weight" for end in TOKEN_EMBEDDINGS)
    return next((other for other in base.tensors if f".{other}".endswith(ends)), None)


def _is_tied(base: Checkpoint) -> bool:
    """True if the base's head and embeddings are one tensor."""
    names = base.config.get("architectures")
    names = [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
    if names and not any(name.endswith(_LANGUAGE_MODELS) for name in names):
        return False
    return base.config.get("tie_word_embeddings") is True or not any(head in base.tensors for head in TIED_HEADS)


def _fold(base: Checkpoint, adapter: Adapter, where: str) -> list[Problem]:
    """Refuse a change to only one of two tied layers: both share one tensor."""
    # In T5 and BART several layers share one tensor; PEFT changes only its target layers.
    ends = tuple(f".{end}.weight" for end in (TOKEN_EMBEDDINGS if _is_tied(base) else ("shared",)))
    heads = TIED_HEADS if _is_tied(base) else ()
    tied = [name for name in changed_tensors(adapter) if f".{name}".endswith(ends) or name in heads]
    what = "the adapter changes one of the layers (head, embeddings) that are one tensor in the base"
    return [Problem(what, where, got=some(tied), remedy=KEEP_APART)] if tied else []


def _agree(adapters: Mapping[str, Adapter], folded: bool) -> list[Problem]:
    """Compare adapters with one another: shapes, and modules that one adapts and another replaces."""
    problems = []
    seen: dict[str, tuple[str, LowRank]] = {}
    for name, adapter in adapters.items():
        for module in adapter.modules.values():
            first, other = seen.setdefault(module.module, (name, module))
            if (other.shape, other.embedding) != (module.shape, module.embedding):
                what = f"B·A has shape {other.shape} in {first}, {module.shape} in {name}"
                problems.append(Problem(what, where=module.module, remedy=REMEDY))
    saved = {tensor for adapter in adapters.values() for tensor in adapter.saved}
    both = [module for module in seen if f"{module}.weight" in saved]
    if both and not folded:
        what = f"{some(both)}: adapted by one policy, replaced as a whole (modules_to_save) by another"
        problems.append(Problem(what, "--as adapter", remedy="pass --as full"))
    return problems


def _compare_origin(base: Base, reference: str, adapter: Adapter, where: str) -> list[Problem]:
    """Find adapters of another base by the hash in their training.json, else by the name of their base."""
    whole = isinstance(base, Checkpoint)
    recorded, named = recorded_base(adapter.folder), adapter.config.base
    if recorded and whole:
        return compare_hashes(base.folder, recorded, TRAINING_FILE, where)
    if not named or named == reference:
        return []
    if not _is_model(named):
        # The folder may be a download of the named model, or a path of the machine that trained the adapter.
        if _is_model(reference) or _last_part(named) == _last_part(reference):
            return []
        got = f"{named[:_LONGEST]} ({ADAPTER_CONFIG})"
        return [Problem("trained from another base", where, reference, got, REMEDY)]
    folder = Path(named)
    if whole and folder.resolve() != base.folder.resolve() and any(folder.glob("*.safetensors")):
        return compare_hashes(base.folder, weights_hash(folder), named[:_LONGEST], where)
    return []


def _same_bases(adapters: Mapping[str, Adapter]) -> list[Problem]:
    """Compare the adapters' bases with one another; bases on this machine were compared before."""
    recorded = {name: recorded_base(adapter.folder) for name, adapter in adapters.items()}
    if len({value for value in recorded.values() if value}) > 1:
        got = ", ".join(f"{value[:12]}… for {name}" for name, value in recorded.items() if value)
        return [Problem("the adapters were trained from different bases", got=got, remedy=REMEDY)]
    named = {name: adapter.config.base for name, adapter in adapters.items() if adapter.config.base}
    known = all(recorded.values()) or all(map(_is_model, named.values()))
    if known or len(set(map(_last_part, named.values()))) < 2:
        return []
    got = ", ".join(f"{base[:_LONGEST]} for {name}" for name, base in named.items())
    remedy = f"{REMEDY}; if they are one model, name it alike in each {ADAPTER_CONFIG}"
    return [Problem("the adapters name different bases", got=got, remedy=remedy)]


def _last_part(reference: str) -> str:
    """Return the last part of a path or Hub id; the rest differs between machines."""
    return os.path.basename(os.path.normpath(reference))


def _is_model(reference: str) -> bool:
    """True if a name is the folder of a model on this machine."""
    try:
        return (Path(reference) / "config.json").is_file()
    except (OSError, ValueError):
        return False

"""Which base adapters were trained from: by a recorded hash, by the weights of the folder they name, or by its name."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rewarded_lines.checkpoints.adapter_config import ADAPTER_CONFIG
from rewarded_lines.checkpoints.adapters import Adapter
from rewarded_lines.checkpoints.block_counts import of_text
from rewarded_lines.checkpoints.dtypes import as_float64
from rewarded_lines.checkpoints.hashing import weights_hash
from rewarded_lines.checkpoints.missing_weights import fold
from rewarded_lines.checkpoints.reader import Checkpoint, read_json_object
from rewarded_lines.checkpoints.tensor_names import under_names_of
from rewarded_lines.errors import Problem
from rewarded_lines.folders import TRAINING_FILE, json_object_in
from rewarded_lines.kernels.blocks import blocks_of
from rewarded_lines.merger.config_checks import REMEDY
from rewarded_lines.merger.lora_folding import Base
from rewarded_lines.merger.model_checks import compare_hashes, is_head, recorded_base
from rewarded_lines.merger.tied_embeddings import is_embedding

_LONGEST = 200
# What names of copies of one model add: other types of number, and the vendor once more.
_COPY = re.compile(
    r"^meta-|[-_.](unsloth|bnb|nf4|fp4|fp8|int4|int8|[48]-?bit|awq|gptq|hqq|dynamic|bf16|fp16)(?=[-_.]|$)"
)
_SIZES = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size", "num_attention_heads", "intermediate_size")


def compare_origin(base: Base, reference: str, adapter: Adapter, where: str) -> list[Problem]:
    """Find adapters of another base by the hash in their training.json, else by the name of their base."""
    whole = isinstance(base, Checkpoint)
    recorded, named = recorded_base(adapter.folder), adapter.config.base
    if recorded and whole:
        return compare_hashes(base.folder, recorded, TRAINING_FILE, where)
    if not named or named == reference:
        return []
    if remedy := _stacked(Path(named), base, reference):
        return [Problem("trained on top of another adapter of this base", where, got=named[:_LONGEST], remedy=remedy)]
    if not _is_model(named):
        # The folder may be a download of the named model, or a path of the machine that trained the adapter.
        if _is_model(reference) or _model(named) == _model(reference):
            return []
        got = f"{named[:_LONGEST]} ({ADAPTER_CONFIG})"
        remedy = f"{REMEDY}; if {reference} is the same model, download it and give its folder as base"
        return [Problem("trained from another base", where, reference, got, remedy)]
    folder = Path(named)
    if not whole or folder.resolve() == base.folder.resolve() or not any(folder.glob("*.safetensors")):
        return []
    if copied := _quantized(folder):
        # The weights of a quantized copy have no values to compare.
        if all(of_text(copied, key) == of_text(base.config, key) for key in _SIZES):
            return []
        return [Problem("trained from another base", where, reference, f"{named[:_LONGEST]}, of other sizes", REMEDY)]
    problems = compare_hashes(base.folder, weights_hash(folder), named[:_LONGEST], where)
    return [] if problems and _has_same_values(Checkpoint(base.folder), Checkpoint(folder)) else problems


def _stacked(named: Path, base: Base, reference: str) -> str:
    """Return the remedy if an adapter's base is another adapter of this very base; else ""."""
    under = json_object_in(named / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not isinstance(under, str) or not under:
        return ""
    same = under == reference or (_is_model(under) and Path(under).resolve() == base.folder.resolve())
    return fold(named) if same else ""


def same_bases(adapters: Mapping[str, Adapter]) -> list[Problem]:
    """Compare the adapters' bases with one another; bases on this machine were compared before."""
    recorded = {name: recorded_base(adapter.folder) for name, adapter in adapters.items()}
    if len({value for value in recorded.values() if value}) > 1:
        got = ", ".join(f"{value[:12]}… for {name}" for name, value in recorded.items() if value)
        return [Problem("the adapters were trained from different bases", got=got, remedy=REMEDY)]
    named = {name: adapter.config.base for name, adapter in adapters.items() if adapter.config.base}
    known = all(recorded.values()) or all(map(_is_model, named.values()))
    if known or len(set(map(_model, named.values()))) < 2:
        return []
    got = ", ".join(f"{base[:_LONGEST]} for {name}" for name, base in named.items())
    remedy = f"{REMEDY}; if they are one model, name it alike in each {ADAPTER_CONFIG} (base_model_name_or_path)"
    return [Problem("the adapters name different bases", got=got, remedy=remedy)]


def notes_on_origins(reference: str, adapters: Mapping[str, Adapter]) -> list[str]:
    """Return a note for each adapter that names another copy of the base, and has no hash of it."""
    return [
        f"policy `{name}` names {adapter.config.base[:_LONGEST]} as its base; taken for a copy of {reference}"
        for name, adapter in adapters.items()
        if adapter.config.base
        and _last_part(adapter.config.base) != _last_part(reference)
        and not recorded_base(adapter.folder)
        and (_quantized(Path(adapter.config.base)) or not _is_model(adapter.config.base))
    ]


def _has_same_values(base: Checkpoint, other: Checkpoint) -> bool:
    """True if a base is another one saved anew: in other files, a wider type, with more or fewer tokens, another head.

    All values that both have must be equal.
    """
    theirs = under_names_of(base.tensors, other.tensors)
    if not all(is_head(name) for name in base.tensors.keys() ^ theirs.keys()):
        return False
    other.tensors = theirs
    for name in base.tensors.keys() & theirs.keys():
        one, two = base.tensors[name], theirs[name]
        if one.shape[1:] != two.shape[1:] or (one.shape != two.shape and not (is_head(name) or is_embedding(name))):
            return False
        for block in blocks_of(min(one.elements, two.elements)):
            first, second = (as_float64(source.read(name, *block)) for source in (base, other))
            if not np.array_equal(first, second, equal_nan=True):
                return False
    return True


def _model(reference: str) -> str:
    """Return the name of a model, the same for its copies: `unsloth/Qwen3-8B-bnb-4bit` is a copy of `Qwen/Qwen3-8B`."""
    return _COPY.sub("", _last_part(reference).lower())


def _quantized(folder: Path) -> dict[str, Any]:
    """Return the config of a quantized model on this machine, {} of another."""
    config = read_json_object(folder / "config.json") if _is_model(str(folder)) else {}
    return config if config.get("quantization_config") else {}


def _last_part(reference: str) -> str:
    """Return the last part of a path or Hub id; the rest differs between machines."""
    return os.path.basename(os.path.normpath(reference))


def _is_model(reference: str) -> bool:
    """True if a name is the folder of a model on this machine."""
    try:
        return (Path(reference) / "config.json").is_file()
    except (OSError, ValueError):
        return False

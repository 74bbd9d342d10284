"""Pre-flight for adapters: whether they were trained from this base, and fit its matrices and one another."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
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
from rewarded_lines.planning.compatibility import REMEDY, RESIZE, compare_tokenizers, read_if_there
from rewarded_lines.planning.folding import is_transposed, stored_shape
from rewarded_lines.streaming.blocks import blocks_of

Base = Checkpoint | BareBase
_SHOWN = 3
_LONGEST = 200
_OTHER_NAMES = (
    f"{REMEDY}; where transformers names layers otherwise than the checkpoint does (LLaVA, Gemma 3, Qwen2-VL), name as "
    "base a folder with its config.json alone"
)
_LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForMaskedLM", "ForPreTraining")


def check_adapters(base: Base, reference: str, adapters: Mapping[str, Adapter], folded: bool) -> list[Problem]:
    """Return all that keeps adapters from being merged over a base.

    Args:
        base: with or without its weights.
        reference: how the user named the base.
        adapters: by name.
        folded: they are added to the base's weights; otherwise the result is an adapter.
    """
    problems: list[Problem] = []
    for name, adapter in adapters.items():
        where = f"policy `{name}` ({adapter.folder})"
        found = [*_fit(base, adapter, where), *_compare_origin(base, reference, adapter, where)]
        if folded:
            found += _fold(base, adapter, where)
        found += compare_tokenizers(base.folder, adapter.folder, where)
        problems += _few(found, where)
    return problems + _few([*_agree(adapters, folded), *_same_bases(adapters)], "policies")


def notes_on(base: Base, adapters: Mapping[str, Adapter]) -> list[str]:
    """Return what the user should know of tensors that are left out."""
    notes = []
    for name, adapter in adapters.items():
        if adapter.copies:
            compared = (
                "equal to the base's" if isinstance(base, Checkpoint) else "not compared, the base has no weights"
            )
            notes.append(f"left out: {', '.join(adapter.copies)} in {name}, PEFT's copy of the base's ({compared})")
    return notes


def _fit(base: Base, adapter: Adapter, where: str) -> list[Problem]:
    """Compare names, shapes and types with the base's tensors, where there are any."""
    if isinstance(base, BareBase):
        if not adapter.saved:
            return []
        what = f"{len(adapter.saved)} tensors are saved whole (modules_to_save), their residuals need the base's"
        remedy = "give a base with its weights, not quantized"
        return [Problem(what, where, got=_some(adapter.saved), remedy=remedy)]
    problems = []
    missing = [name for name, module in adapter.modules.items() if _stored_name(base, module.tensor) is None]
    if missing and len(missing) == len(adapter.modules):
        what = f"none of the adapter's {len(missing)} modules is in the base"
        return [Problem(what, where, got=_some(missing), remedy=_OTHER_NAMES)]
    for module in adapter.modules.values():
        problems += _fit_module(base, adapter, module, where)
    for name, info in {**adapter.saved, **adapter.copies}.items():
        problems += _fit_whole(base, name, info, where, compare=name in adapter.copies, adapter=adapter)
    return problems


def _fit_module(base: Checkpoint, adapter: Adapter, module: LowRank, where: str) -> list[Problem]:
    stored = _stored_name(base, module.tensor)
    if stored is None:
        return [Problem(f"{module.module} is not in the base", where, got=module.tensor, remedy=REMEDY)]
    shape, expected = base.tensors[stored].shape, stored_shape(module, base.config)
    if shape != expected:
        what = f"shape {shape} in base, {expected} by A and B"
        remedy = RESIZE if module.embedding or stored != module.tensor else REMEDY
        return [Problem(what, f"{where}: {module.tensor}", remedy=remedy)]
    if not base.tensors[stored].dtype.floating:
        return [Problem("the base's tensor holds no floating-point numbers", f"{where}: {module.tensor}")]
    square = shape[0] == shape[1] and not module.embedding
    if adapter.config.fan_in_fan_out and square and not is_transposed(module, base.config):
        what = "whether this square matrix is stored as [in, out] cannot be told (fan_in_fan_out is true)"
        remedy = f"set fan_in_fan_out to false in {ADAPTER_CONFIG} if the layer is an nn.Linear"
        return [Problem(what, f"{where}: {module.tensor}", remedy=remedy)]
    return []


def _fit_whole(
    base: Checkpoint, name: str, info: TensorInfo, where: str, compare: bool, adapter: Adapter
) -> list[Problem]:
    """Compare a tensor that the adapter stores whole with the base's; copies must be equal."""
    meant = _stored_name(base, name)
    stored = meant if compare else name
    if stored is None or stored not in base.tensors:
        tied = meant is not None
        what = f"{name} is tied to the embeddings in the base" if tied else f"{name} is not in the base"
        remedy = "untie them in the base (tie_word_embeddings false), save it, and train from that" if tied else REMEDY
        return [Problem(what, where, remedy=remedy)]
    theirs = base.tensors[stored]
    if theirs.shape != info.shape:
        return [
            Problem(f"shape {theirs.shape} in base, {info.shape} in the adapter", f"{where}: {name}", remedy=RESIZE)
        ]
    if not (theirs.dtype.floating and info.dtype.floating):
        return [Problem("only floating-point tensors are merged", f"{where}: {name}", got=info.dtype.torch)]
    if compare and not _equal(base, theirs, adapter, info):
        what = "the adapter's copy of a base tensor differs from the base's"
        return [Problem(what, f"{where}: {name}", remedy=REMEDY)]
    return []


def _stored_name(base: Checkpoint, name: str) -> str | None:
    """Return the tensor of the base that a name means; a head without one is tied to the embeddings."""
    if name in base.tensors:
        return name
    if name not in TIED_HEADS or not is_tied(base):
        return None
    ends = tuple(f".{end}.weight" for end in TOKEN_EMBEDDINGS)
    return next((other for other in base.tensors if f".{other}".endswith(ends)), None)


def is_tied(base: Checkpoint) -> bool:
    """Say whether the base's head and embeddings are one tensor."""
    names = base.config.get("architectures")
    names = [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
    if names and not any(name.endswith(_LANGUAGE_MODELS) for name in names):
        return False
    return base.config.get("tie_word_embeddings") is True or not any(head in base.tensors for head in TIED_HEADS)


def _fold(base: Base, adapter: Adapter, where: str) -> list[Problem]:
    """Refuse what PEFT adds to one of two tied layers: the one tensor of both cannot take it."""
    if isinstance(base, BareBase):
        return []
    changed = [module.tensor for module in adapter.modules.values()] + list(adapter.saved)
    # T5 and BART: one tensor, several layers, of which PEFT changes the one it is told to.
    ends = tuple(f".{end}.weight" for end in (TOKEN_EMBEDDINGS if is_tied(base) else ("shared",)))
    tied = [name for name in changed if f".{name}".endswith(ends) or (is_tied(base) and name in TIED_HEADS)]
    what = "the adapter changes one of the layers (head, embeddings) that are one tensor in the base"
    remedy = "pass --as adapter, which keeps them apart as PEFT does; or untie them in the base"
    return [Problem(what, where, got=_some(tied), remedy=remedy)] if tied else []


def _equal(base: Checkpoint, theirs: TensorInfo, adapter: Adapter, ours: TensorInfo) -> bool:
    """Say whether two tensors hold the same numbers, in whatever types."""
    for start, count in blocks_of(theirs.elements):
        first = as_float64(base.read(theirs.name, start, count), theirs.dtype)
        if not np.array_equal(first, as_float64(adapter.read(ours.name, start, count), ours.dtype), equal_nan=True):
            return False
    return True


def _agree(adapters: Mapping[str, Adapter], folded: bool) -> list[Problem]:
    """Compare adapters with one another: shapes, and whether a module is adapted here and replaced there."""
    problems = []
    seen: dict[str, tuple[str, LowRank]] = {}
    for name, adapter in adapters.items():
        for module in adapter.modules.values():
            first, other = seen.setdefault(module.module, (name, module))
            if (other.shape, other.embedding) != (module.shape, module.embedding):
                what = f"B·A has shape {other.shape} in {first}, {module.shape} in {name}"
                problems.append(Problem(what, where=module.module, remedy=REMEDY))
    saved = {tensor: name for name, adapter in adapters.items() for tensor in adapter.saved}
    both = [module for module, _ in seen.items() if f"{module}.weight" in saved]
    if both and not folded:
        what = f"{_some(both)}: adapted by one policy, replaced as a whole (modules_to_save) by another"
        problems.append(Problem(what, "--as adapter", remedy="pass --as full"))
    return problems


def _compare_origin(base: Base, reference: str, adapter: Adapter, where: str) -> list[Problem]:
    """Tell adapters of another base by what their training recorded, or else by the base that they name."""
    whole = isinstance(base, Checkpoint)
    recorded, named = _recorded(adapter), adapter.config.base
    if recorded and whole:
        return _compare_hashes(base, recorded, TRAINING_FILE, where)
    if not named or named == reference:
        return []
    if not _is_model(named):
        # A folder may be a download of the model named, or what was elsewhere when the adapter was trained.
        if _is_model(reference) or _last_part(named) == _last_part(reference):
            return []
        return [
            Problem("trained from another base", where, reference, f"{named[:_LONGEST]} ({ADAPTER_CONFIG})", REMEDY)
        ]
    folder = Path(named)
    if whole and folder.resolve() != base.folder.resolve() and any(folder.glob("*.safetensors")):
        return _compare_hashes(base, weights_hash(folder), named[:_LONGEST], where)
    return []


def _compare_hashes(base: Base, theirs: str, source: str, where: str) -> list[Problem]:
    actual = weights_hash(base.folder)
    if theirs == actual:
        return []
    expected, got = f"base weights {actual[:12]}… ({base.folder})", f"{theirs[:12]}… ({source})"
    return [Problem("trained from another base", where, expected, got, REMEDY)]


def _same_bases(adapters: Mapping[str, Adapter]) -> list[Problem]:
    """Compare what adapters say of their bases; those that are here have been compared with the base itself."""
    told = {name: _recorded(adapter) for name, adapter in adapters.items()}
    if len({told_hash for told_hash in told.values() if told_hash}) > 1:
        got = ", ".join(f"{value[:12]}… for {name}" for name, value in told.items() if value)
        return [Problem("the adapters were trained from different bases", got=got, remedy=REMEDY)]
    named = {name: adapter.config.base for name, adapter in adapters.items() if adapter.config.base}
    if all(told.values()) or all(map(_is_model, named.values())) or len(set(map(_last_part, named.values()))) < 2:
        return []
    got = ", ".join(f"{base[:_LONGEST]} for {name}" for name, base in named.items())
    remedy = f"{REMEDY}; if they are one model, name it alike in each {ADAPTER_CONFIG}"
    return [Problem("the adapters name different bases", got=got, remedy=remedy)]


def _recorded(adapter: Adapter) -> str:
    return str(read_if_there(adapter.folder / TRAINING_FILE).get("base_hash") or "")


def _last_part(reference: str) -> str:
    """Return the name at the end of a path or Hub id: what is before it differs from machine to machine."""
    return os.path.basename(os.path.normpath(reference))


def _is_model(reference: str) -> bool:
    """Say whether a name is the folder of a model here."""
    try:
        return (Path(reference) / "config.json").is_file()
    except (OSError, ValueError):
        return False


def _some(names: Iterable[str]) -> str:
    shown = list(names)
    return ", ".join(shown[:_SHOWN]) + (f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else "")


def _few(problems: list[Problem], where: str) -> list[Problem]:
    rest = len(problems) - 2 * _SHOWN
    return problems[: 2 * _SHOWN] + ([Problem(f"{rest} more likewise", where)] if rest > 0 else [])

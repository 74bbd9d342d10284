"""Pre-flight for adapters: they must come from this base, and fit its matrices and one another."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from rewarded_lines.checkpoints.adapter_config import ADAPTER_CONFIG
from rewarded_lines.checkpoints.adapters import Adapter, BareBase
from rewarded_lines.checkpoints.dtypes import as_float64
from rewarded_lines.checkpoints.headers import TensorInfo
from rewarded_lines.checkpoints.low_rank import LowRank, outermost_first
from rewarded_lines.checkpoints.reader import Checkpoint
from rewarded_lines.errors import Problem, few
from rewarded_lines.kernels.blocks import blocks_of
from rewarded_lines.merger.adapter_origins import compare_origin, notes_on_origins, same_bases
from rewarded_lines.merger.config_checks import REMEDY, resize
from rewarded_lines.merger.lora_folding import Base, is_transposed, stored_parts, stored_shape
from rewarded_lines.merger.model_checks import is_head, some, with_head
from rewarded_lines.merger.tied_embeddings import stored_name, unsettled

KEEP_APART = "pass --as adapter, which keeps tied layers apart as PEFT does"
# Earlier ones took [experts, out, in] for [experts, in, out].
_FIRST_FOR_EXPERTS = (0, 19)
_SHOWN = 6
_OTHER_NAMES = (
    f"{REMEDY}; if transformers names layers differently from the checkpoint (LLaVA, Gemma 3, Qwen2-VL), give as "
    "base a folder with only its config.json"
)


def check_adapters(base: Base, reference: str, adapters: Mapping[str, Adapter], folded: bool) -> list[Problem]:
    """Return every fault that prevents a merge of adapters: `folded` into the base's weights, or into an adapter.

    `reference` is the user's folder or Hub id of the base.
    """
    problems: list[Problem] = []
    for name, adapter in adapters.items():
        where = f"policy `{name}` ({adapter.folder})"
        found = [*_fit(base, adapter, where), *compare_origin(base, reference, adapter, where)]
        if folded and isinstance(base, Checkpoint) and (tied := unsettled(base, adapter)):
            what = "the adapter changes one of several layers that are one tensor in the base"
            found.append(Problem(what, where, got=some(tied), remedy=KEEP_APART))
        problems += few(found, where, _SHOWN)
    return problems + few([*_agree(adapters, folded), *same_bases(adapters)], "policies", _SHOWN)


def notes_on(base: Base, reference: str, adapters: Mapping[str, Adapter]) -> list[str]:
    """Return notes on the tensors that are left out, and on adapters that name another copy of the base."""
    compared = (
        "equal to the base's, but for rows that the adapter replaces"
        if isinstance(base, Checkpoint)
        else "not compared, the base has no weights"
    )
    notes = [f"policy `{name}`: every B is zero, so it changes nothing" for name in _unchanged(adapters)]
    return (
        notes
        + notes_on_origins(reference, adapters)
        + [
            f"left out: {', '.join(adapter.copies)} in {name}, PEFT's copy of the base's ({compared})"
            for name, adapter in adapters.items()
            if adapter.copies
        ]
    )


def _unchanged(adapters: Mapping[str, Adapter]) -> list[str]:
    """Return the adapters that nobody trained: B starts at zero."""
    plain = {name: one for name, one in adapters.items() if one.modules and not (one.saved or one.rows)}
    # Of embeddings A starts at zero.
    zeros = {name: [m.a if m.embedding else m.b for m in one.modules.values()] for name, one in plain.items()}
    return [name for name, infos in zeros.items() if not any(plain[name].read(info.name).any() for info in infos)]


def _fit(base: Base, adapter: Adapter, where: str) -> list[Problem]:
    """Compare names, shapes and types with the base's tensors."""
    if isinstance(base, BareBase):
        whole = [*adapter.saved, *adapter.rows]
        if not whole:
            return []
        what = f"{len(whole)} tensors are saved whole (modules_to_save), their residuals need the base's"
        remedy = "give a base with its weights, not quantized"
        return [Problem(what, where, got=some(whole), remedy=remedy)]
    missing = [module.tensor for module in adapter.modules.values() if not _is_there(base, module)]
    if missing and len(missing) == len(adapter.modules):
        what = f"none of the adapter's {len(missing)} modules is in the base"
        return [Problem(what, where, got=some(missing), remedy=_OTHER_NAMES)]
    found = [_fit_module(base, adapter, module, where) for module in adapter.modules.values()]
    found += [_fit_whole(base, name, info, where) for name, info in adapter.saved.items()]
    found += [_fit_rows(base, adapter, name, where) for name in adapter.rows]
    found += [_fit_copy(base, adapter, name, info, where) for name, info in adapter.copies.items()]
    return [problem for problem in found if problem]


def _is_there(base: Checkpoint, module: LowRank) -> bool:
    return stored_name(base, module.tensor) is not None or bool(stored_parts(module, base))


def _fit_module(base: Checkpoint, adapter: Adapter, module: LowRank, where: str) -> Problem | None:
    if not _is_there(base, module):
        what, remedy = f"{module.module} is not in the base", REMEDY
        if module.experts > 1:
            what += f", with {module.experts} experts, as A and the rank {module.rank} give them"
            remedy += f"; or correct r and rank_pattern in {ADAPTER_CONFIG}"
        return Problem(what, where, got=module.tensor, remedy=remedy)
    where = f"{where}: {module.tensor}"
    stored = stored_name(base, module.tensor)
    names = list(stored_parts(module, base)) if stored is None else [stored]
    # A mixture of one expert may be stored as a matrix, or as a stack of one.
    shape, expected = base.tensors[names[0]].shape, stored_shape(module, base)
    if stored is not None and shape not in (expected, (1, *expected) if module.experts else expected):
        remedy = resize(expected[0]) if module.embedding or stored != module.tensor else REMEDY
        return Problem(f"shape {shape} in base, {expected} by A and B", where, remedy=remedy)
    if not all(base.tensors[name].dtype.floating for name in names):
        return Problem("the base's tensor holds no floating-point numbers", where)
    return _fit_square(base, adapter, module, where)


def _fit_square(base: Checkpoint, adapter: Adapter, module: LowRank, where: str) -> Problem | None:
    """Refuse a square matrix if nothing says whether it is stored as [in, out] or [out, in]."""
    if module.shape[-1] != module.shape[-2] or module.embedding:
        return None
    what = "this square matrix may be stored as [in, out] or [out, in]"
    if module.experts > 1 and _version(adapter) < _FIRST_FOR_EXPERTS:
        remedy = f"if PEFT 0.19 or later saved the adapter, write its version as peft_version into {ADAPTER_CONFIG}"
        return Problem(
            f"{what}: PEFT before 0.19 took the experts of most families for the former", where, remedy=remedy
        )
    if adapter.config.fan_in_fan_out and not module.experts and not is_transposed(module, base):
        remedy = f"set fan_in_fan_out to false in {ADAPTER_CONFIG} if the layer is an nn.Linear"
        return Problem(f"{what} (fan_in_fan_out is true)", where, remedy=remedy)
    return None


def _version(adapter: Adapter) -> tuple[int, int]:
    """Return the major and minor version of the PEFT that saved an adapter; zeros if it does not say."""
    match = re.match(r"([0-9]{1,4})\.([0-9]{1,4})", str(adapter.config.content.get("peft_version")))
    return (int(match[1]), int(match[2])) if match else (0, 0)


def _fit_whole(base: Checkpoint, name: str, info: TensorInfo, where: str) -> Problem | None:
    """Compare a tensor that the adapter stores whole with the base's."""
    stored = stored_name(base, name)
    if stored is None:
        remedy = with_head("AutoModelForSequenceClassification", info) if is_head(name) else REMEDY
        return Problem(f"{name} is not in the base", where, remedy=remedy)
    theirs, where = base.tensors[stored], f"{where}: {name}"
    if theirs.shape != info.shape:
        remedy = resize(info.shape[0]) if theirs.shape[1:] == info.shape[1:] else REMEDY
        return Problem(f"shape {theirs.shape} in base, {info.shape} in the adapter", where, remedy=remedy)
    if not (theirs.dtype.floating and info.dtype.floating):
        return Problem("only floating-point tensors are merged", where, got=info.dtype.torch)
    return None


def _fit_rows(base: Checkpoint, adapter: Adapter, name: str, where: str) -> Problem | None:
    """Compare the rows that replace those of an embedding with the embedding."""
    rows, stored = adapter.rows[name], stored_name(base, name)
    where = f"{where}: {name}"
    if stored is None or len(base.tensors[stored].shape) != 2:
        return Problem("these embeddings are not in the base", where, remedy=REMEDY)
    if any(module.tensor == name for module in adapter.modules.values()):
        return Problem("one adapter both replaces rows of these embeddings and adds to all of them", where)
    shape = base.tensors[stored].shape
    if max(rows.tokens) >= shape[0] or rows.info.shape[1] != shape[1]:
        what = f"shape {shape} in base, rows of {rows.info.shape[1]} for tokens up to {max(rows.tokens)} in the adapter"
        return Problem(what, where, remedy=resize(max(rows.tokens) + 1))
    return None


def _fit_copy(base: Checkpoint, adapter: Adapter, name: str, info: TensorInfo, where: str) -> Problem | None:
    """Compare the adapter's copy of a base tensor with the base's: shape, type and every value.

    Rows that the adapter replaces may differ: added tokens start at random in each training, or anew in the base.
    """
    stored = stored_name(base, name)
    if (problem := _fit_whole(base, name, info, where)) or stored is None:
        return problem
    theirs = base.tensors[stored]
    differing: set[int] = set()
    for start, count in blocks_of(theirs.elements):
        first = as_float64(base.read(theirs.name, start, count))
        second = as_float64(adapter.read(info.name, start, count))
        places = np.flatnonzero((first != second) & ~(np.isnan(first) & np.isnan(second)))
        differing |= set(((start + places) // theirs.shape[-1]).tolist())
    # A tied head that changes as the embeddings do is settled by now.
    names = (name, stored)
    replaced = {token for each in names if each in adapter.rows for token in adapter.rows[each].tokens}
    # Two models share no row. So if the first rows are equal, the others are of tokens that were added.
    added = min(differing, default=0) > 0 and any(each in adapter.saved for each in names)
    if differing <= replaced or added:
        return None
    what = "the adapter's copy of a base tensor differs from the base's"
    return Problem(what, f"{where}: {name}", remedy=REMEDY)


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
    return problems if folded else problems + _loadable(adapters)


def _loadable(adapters: Mapping[str, Adapter]) -> list[Problem]:
    """Refuse what PEFT could not load as one adapter: a matrix changed in two ways, an unknown order of nesting."""
    modules = {name: module for adapter in adapters.values() for name, module in adapter.modules.items()}
    kinds: dict[str, set[str]] = {module.tensor: {"target_modules"} for module in modules.values()}
    for adapter in adapters.values():
        for kind, names in (("modules_to_save", adapter.saved), ("trainable_token_indices", adapter.rows)):
            for tensor in names:
                kinds.setdefault(tensor, set()).add(kind)
    both = {tensor: sorted(found) for tensor, found in kinds.items() if len(found) > 1}
    problems = [f"{name}: changed by {' of one policy and '.join(found)} of another" for name, found in both.items()]
    within: dict[str, set[str]] = {}
    for name in (name for name, module in modules.items() if module.experts):
        within.setdefault(name.rpartition(".")[0], set()).add(name.rpartition(".")[2])
    problems += [
        f"{owner}: the order in which PEFT nests {', '.join(sorted(names))} is not known"
        for owner, names in within.items()
        if outermost_first(names) is None
    ]
    problems += [
        f"{name}: the base lacks rows of other tokens than those of trainable_token_indices"
        for name in {name for adapter in adapters.values() for name in adapter.rows}
        if _lacks_rows(adapters, name)
    ]
    apart = [owner for owner in within if any(re.match(rf"{re.escape(owner)}\.[0-9]+\.", name) for name in modules)]
    problems += [f"{owner}: fused in one policy, a module for each expert in another" for owner in apart]
    return [Problem(what, "--as adapter", remedy="pass --as full") for what in problems]


def _lacks_rows(adapters: Mapping[str, Adapter], name: str) -> bool:
    """True if added tokens are not all among those whose rows a merged adapter would replace."""
    added = next((one.enlarged[name].shape[0] for one in adapters.values() if name in one.enlarged), 0)
    before = next((one.before for one in adapters.values() if name in one.enlarged), added)
    tokens = {token for one in adapters.values() if name in one.rows for token in one.rows[name].tokens}
    return not set(range(before, added)) <= tokens

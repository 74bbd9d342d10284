"""Head and embeddings: one tensor in tied bases, or one for each; and vocabularies enlarged before training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np

from rewarded_lines.checkpoints.adapters import Adapter
from rewarded_lines.checkpoints.block_counts import of_text
from rewarded_lines.checkpoints.dtypes import as_float64
from rewarded_lines.checkpoints.families import TIED_HEADS, TOKEN_EMBEDDINGS
from rewarded_lines.checkpoints.headers import TensorInfo
from rewarded_lines.checkpoints.low_rank import LowRank
from rewarded_lines.checkpoints.reader import Checkpoint, TensorFiles
from rewarded_lines.kernels.blocks import blocks_of
from rewarded_lines.merger.lora_folding import Base

_LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_OTHER_TIED_MODELS = ("ForMaskedLM", "ForPreTraining")
_EMBEDDINGS = tuple(f".{end}.weight" for end in TOKEN_EMBEDDINGS)


def changed_tensors(adapter: Adapter) -> list[str]:
    """Return the base's tensors that an adapter changes."""
    modules = (module.parts or [module.tensor] for module in adapter.modules.values())
    return [*(name for names in modules for name in names), *adapter.saved, *adapter.rows]


def stored_name(base: Checkpoint, name: str) -> str | None:
    """Return the base's tensor for a name; a head without a tensor is tied to the embeddings, or they to it."""
    if name in base.tensors:
        return name
    if not is_tied(base):
        return None
    others: Iterable[str] = ()
    if name in TIED_HEADS:
        others = (other for other in base.tensors if is_embedding(other))
    elif is_embedding(name) and not any(map(is_embedding, base.tensors)):
        others = (other for other in base.tensors if other in TIED_HEADS)
    return next(iter(others), None)


def is_embedding(name: str) -> bool:
    """True if a tensor holds the embeddings of tokens."""
    return f".{name}".endswith(_EMBEDDINGS)


def is_tied(base: Checkpoint) -> bool:
    """True if the base's head and embeddings are one tensor."""
    names = _architectures(base)
    if names and not any(name.endswith(_LANGUAGE_MODELS + _OTHER_TIED_MODELS) for name in names):
        return False
    return base.config.get("tie_word_embeddings") is True or not any(head in base.tensors for head in TIED_HEADS)


def same_values(first: TensorFiles, one: TensorInfo, second: TensorFiles, other: TensorInfo) -> bool:
    """True if two tensors have one type, one shape and the same bytes."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    pairs = ((first.read(one.name, *block), second.read(other.name, *block)) for block in blocks_of(one.elements))
    return all(np.array_equal(*pair) for pair in pairs)


def unsettled(base: Checkpoint, adapter: Adapter) -> list[str]:
    """Return the tensors that an adapter changes, and that other layers share which cannot get a tensor of their own.

    In T5 and BART several layers share one tensor, and PEFT changes only some of them.
    """
    tied = is_tied(base) and _head(base) is None
    return [
        name
        for name in changed_tensors(adapter)
        if f".{name}".endswith(".shared.weight") or (tied and _is_of_pair(name))
    ]


def name_apart(base: Checkpoint, adapters: Iterable[Adapter]) -> None:
    """Give the base a second name for a tied tensor where adapters store the head or its rows."""
    for adapter in adapters:
        for head in [name for name in adapter.rows if name in TIED_HEADS and is_tied(base)]:
            embeddings = stored_name(base, head)
            if embeddings in adapter.rows and _same_rows(adapter, head, embeddings):
                adapter.rows.pop(head)
        for name in [*adapter.saved, *adapter.rows]:
            stored = stored_name(base, name)
            if stored is not None and name not in base.tensors:
                base.tensors[name] = replace(base.tensors[stored], name=name)


def settle(base: Checkpoint, policies: Mapping[str, Checkpoint | Adapter]) -> list[str]:
    """Prepare the merge into a base with tied head and embeddings; return notes.

    If all adapters change both alike (`ensure_weight_tying`, `trainable_token_indices`), the tensor stays one.
    Otherwise, and for whole models with a head of their own, all inputs get a head, and the output is untied: PEFT,
    too, keeps the two apart after training one of them.
    """
    adapters = {name: policy for name, policy in policies.items() if isinstance(policy, Adapter)}
    changing = {name: adapter for name, adapter in adapters.items() if any(map(_is_of_pair, changed_tensors(adapter)))}
    pair = _pair(base, changing.values())
    if pair is None:
        return []
    head, embeddings = pair
    known = embeddings in base.tensors
    apart = [name for name, adapter in changing.items() if not known or not _alike(adapter, head, embeddings)]
    whole = {name: policy for name, policy in policies.items() if isinstance(policy, Checkpoint)}
    apart += [name for name, policy in whole.items() if _has_own_head(policy, head, embeddings)]
    for adapter in changing.values():
        if not apart:
            _forget(adapter, head)
        elif embeddings in adapter.rows and head not in adapter.rows:
            adapter.rows[head] = adapter.rows[embeddings]
    if not apart:
        return []
    for source in [base, *whole.values()]:
        _name_both(source, head, embeddings)
    _untie(base)
    return [
        f"{head} and {embeddings} are one tensor in the base and two in the output (tie_word_embeddings false): "
        f"{', '.join(apart)} changes them apart"
    ]


def _pair(base: Checkpoint, changing: Iterable[Adapter]) -> tuple[str, str] | None:
    """Return the names of head and embeddings if the base has one tensor for both."""
    changed = [name for adapter in changing for name in changed_tensors(adapter)]
    head = _head(base)
    # Some files have the tensor under the head's name only.
    embeddings = next(filter(is_embedding, [*base.tensors, *changed]), None)
    if head is None or embeddings is None or _ties(base) is False:
        return None
    own, stored = base.tensors.get(head), base.tensors.get(embeddings)
    if own and stored and not same_values(base, own, base, stored):
        # transformers ties no head that has values of its own, whatever the config says.
        return None
    return head, embeddings


def _has_own_head(policy: Checkpoint, head: str, embeddings: str) -> bool:
    """True if a whole model has a head that is not its embeddings, as PEFT saves a model whose head it trained."""
    own, other = policy.tensors.get(head), policy.tensors.get(embeddings)
    return own is not None and other is not None and not same_values(policy, own, policy, other)


def _name_both(source: Checkpoint, head: str, embeddings: str) -> None:
    """Give the tensor of head and embeddings both names."""
    for name, other in ((head, embeddings), (embeddings, head)):
        if name not in source.tensors and other in source.tensors:
            source.tensors[name] = replace(source.tensors[other], name=name)


def _architectures(base: Checkpoint) -> list[str]:
    names = base.config.get("architectures")
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def _ties(base: Checkpoint) -> bool | None:
    """Return whether the config ties head and embeddings, None if it does not say.

    Earlier versions of transformers said so in the `text_config` of LLaVA and Qwen2.5-VL, and false beside it.
    """
    sections = [base.config, base.config.get("text_config")]
    said = [one.get("tie_word_embeddings") for one in sections if isinstance(one, Mapping)]
    return True if True in said else False if False in said else None


def _untie(base: Checkpoint) -> None:
    """Let the output's config say that the head has a tensor of its own."""
    text = base.config.get("text_config")
    if isinstance(text, Mapping):
        base.config["text_config"] = {**text, "tie_word_embeddings": False}
    base.config["tie_word_embeddings"] = False


def _head(base: Checkpoint) -> str | None:
    """Return the name of the base's head; None if the model has none, or one that this file does not know."""
    if any(name.endswith(".shared.weight") for name in (f".{name}" for name in base.tensors)):
        return None
    if stored := next((head for head in TIED_HEADS if head in base.tensors), None):
        return stored
    names = _architectures(base)
    return TIED_HEADS[0] if not names or any(name.endswith(_LANGUAGE_MODELS) for name in names) else None


def _is_of_pair(name: str) -> bool:
    return name in TIED_HEADS or is_embedding(name)


def _forget(adapter: Adapter, head: str) -> None:
    """Drop an adapter's change of the head, which repeats that of the embeddings."""
    adapter.saved.pop(head, None)
    adapter.rows.pop(head, None)
    adapter.modules.pop(head.removesuffix(".weight"), None)


def _alike(adapter: Adapter, head: str, embeddings: str) -> bool:
    """True if an adapter changes head and embeddings by the same values."""
    if embeddings in adapter.rows:
        return head not in changed_tensors(adapter) or _same_rows(adapter, head, embeddings)
    if head in adapter.saved and embeddings in adapter.saved:
        return same_values(adapter, adapter.saved[head], adapter, adapter.saved[embeddings])
    modules = {module.tensor: module for module in adapter.modules.values()}
    return head in modules and embeddings in modules and _transposes(adapter, modules[head], modules[embeddings])


def _same_rows(adapter: Adapter, head: str, embeddings: str) -> bool:
    """True if an adapter replaces rows of the head by those of the embeddings: PEFT may write both."""
    if head not in adapter.rows:
        return False
    one, other = adapter.rows[head], adapter.rows[embeddings]
    return one.tokens == other.tokens and same_values(adapter, one.info, adapter, other.info)


def _transposes(adapter: Adapter, head: LowRank, embeddings: LowRank) -> bool:
    """True if B·A of the head is (B·A)ᵀ of the embeddings, as `ensure_weight_tying` keeps it."""
    if head.scaling != embeddings.scaling or head.a.shape != embeddings.b.shape[::-1]:
        return False
    (a, b), (other_a, other_b) = ([_read(adapter, info) for info in (one.a, one.b)] for one in (head, embeddings))
    return np.array_equal(a, other_b.T) and np.array_equal(b, other_a.T)


def _read(adapter: Adapter, info: TensorInfo) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    return as_float64(adapter.read(info.name)).reshape(info.shape)


def enlarge(base: Base, adapters: Mapping[str, Adapter]) -> list[str]:
    """Give the base the rows for added tokens that all adapters have alike; return a note.

    Rows that differ from one adapter to another have no start in common, so those are left for the checks to refuse.
    """
    found = list(adapters.values())
    shared = {name: info for name, info in found[0].copies.items() if _added(base, name, info)} if found else {}
    alike = (
        name in other.copies and same_values(found[0], info, other, other.copies[name])
        for other in found[1:]
        for name, info in shared.items()
    )
    if not shared or not all(alike):
        return []
    if not all(_starts_as(base, _name(base, name), found[0], info) for name, info in shared.items()):
        return []
    base.borrow(found[0], {_name(base, name): info for name, info in shared.items()})
    rows = next(iter(shared.values())).shape[0]
    before, text = of_text(base.config, "vocab_size"), base.config.get("text_config")
    if isinstance(text, Mapping) and "vocab_size" in text:
        base.config = {**base.config, "text_config": {**text, "vocab_size": rows}}
    else:
        base.config = {**base.config, "vocab_size": rows}
    for adapter in found:
        adapter.before, adapter.enlarged = int(before), {name: adapter.copies.pop(name) for name in shared}
    return [f"the vocabulary grows from {before} to {rows} tokens: all policies have the same rows for the added ones"]


def _added(base: Base, name: str, info: TensorInfo) -> bool:
    """True if an adapter's copy of the base's embeddings or head has more rows than the base."""
    rows, stored = of_text(base.config, "vocab_size"), _name(base, name)
    if stored in base.tensors:
        rows = base.tensors[stored].shape[0]
        if base.tensors[stored].shape[1:] != info.shape[1:]:
            return False
    return len(info.shape) == 2 and isinstance(rows, int) and info.shape[0] > rows


def _starts_as(base: Base, name: str, adapter: Adapter, info: TensorInfo) -> bool:
    """True if an adapter's copy begins with the base's own rows."""
    stored = base.tensors.get(name)
    if stored is None:
        return True
    pairs = (
        (as_float64(base.read(name, *block)), as_float64(adapter.read(info.name, *block)))
        for block in blocks_of(stored.elements)
    )
    return all(np.array_equal(*pair) for pair in pairs)


def _name(base: Base, name: str) -> str:
    return (stored_name(base, name) if isinstance(base, Checkpoint) else None) or name

"""Tensor name → depth: which block of the model a tensor belongs to, from a declared table, never by a guess."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any, Literal

from rewarded_lines.errors import Problem, UserError, fail

Side = Literal["before", "in", "after", "unknown"]


@dataclass(frozen=True)
class BlockList:
    """One list of blocks as a family of models names it.

    Names are whole modules from the start of the tensor's name: `model.norm` stands for itself and `model.norm.weight`,
    not for `model.normal`; `experts.0` inside `model.layers.3` is block 3.
    """

    path: str
    """The list, e.g. `model.layers` for `model.layers.0.` to `model.layers.{L-1}.`."""
    counts: tuple[str, ...]
    """Where the config declares L, with dots into nested configs; the first key that it has counts."""
    before: tuple[str, ...] = ()
    """Modules that feed the first block."""
    after: tuple[str, ...] = ()
    """Modules that the last block feeds."""


# What a task puts on top, whatever the family below.
HEADS: tuple[str, ...] = (
    *("lm_head", "language_model.lm_head", "embed_out", "final_logits_bias", "cls"),
    *("score", "classifier", "pre_classifier", "classification_head", "qa_outputs", "pooler"),
    *("logit_scale", "logit_bias"),
)
# In a file without token embeddings a head's matrix is the tied embedding, saved under its other name.
TIED_HEADS: tuple[str, ...] = ("lm_head.weight", "language_model.lm_head.weight", "embed_out.weight")
TOKEN_EMBEDDINGS: tuple[str, ...] = ("embed_tokens", "embed_in", "wte", "word_embeddings", "shared")


def _family(path: str, counts: str, before: str, after: str, roots: Sequence[str] = ("",)) -> tuple[BlockList, ...]:
    """Return a list, any head on top, below each root that a wrapping class may put before the names."""
    return tuple(
        BlockList(
            root + path,
            tuple(counts.split()),
            tuple(root + name for name in before.split()),
            (*(root + name for name in after.split()), *HEADS),
        )
        for root in roots
    )


# In the order in which a model runs them: what sees the images stands before the text, encoders before decoders.
BLOCK_LISTS: tuple[BlockList, ...] = (
    # CLIP and SigLIP; "pre_layrnorm" is how CLIP spells it.
    *_family(
        "text_model.encoder.layers",
        counts="text_config.num_hidden_layers num_hidden_layers",
        before="text_model.embeddings",
        after="text_model.final_layer_norm text_model.head text_projection",
    ),
    *_family(
        "vision_model.encoder.layers",
        counts="vision_config.num_hidden_layers num_hidden_layers",
        before="vision_model.embeddings vision_model.pre_layrnorm",
        after="vision_model.post_layernorm vision_model.head visual_projection",
    ),
    # The eyes of LLaVA and Gemma 3, as they are written now and as they were, and of Qwen-VL.
    *_family(
        "vision_tower.encoder.layers",
        counts="vision_config.num_hidden_layers",
        before="vision_tower.embeddings vision_tower.pre_layrnorm",
        after="vision_tower.post_layernorm vision_tower.head multi_modal_projector",
        roots=("", "model."),
    ),
    *_family(
        "vision_tower.vision_model.encoder.layers",
        counts="vision_config.num_hidden_layers",
        before="vision_tower.vision_model.embeddings vision_tower.vision_model.pre_layrnorm",
        after="vision_tower.vision_model.post_layernorm vision_tower.vision_model.head multi_modal_projector",
        roots=("", "model."),
    ),
    *_family(
        "visual.blocks",
        counts="vision_config.depth",
        before="visual.patch_embed visual.pos_embed",
        after="visual.merger visual.deepstack_merger_list",
        roots=("", "model."),
    ),
    # T5 and mT5.
    *_family(
        "encoder.block",
        counts="num_layers",
        before="shared encoder.embed_tokens",
        after="encoder.final_layer_norm",
        roots=("", "transformer."),
    ),
    *_family(
        "decoder.block",
        counts="num_decoder_layers num_layers",
        before="shared decoder.embed_tokens",
        after="decoder.final_layer_norm",
        roots=("", "transformer."),
    ),
    # BART's encoder; without a root also one of CLIP's two encoders, saved alone.
    *_family(
        "encoder.layers",
        counts="encoder_layers num_hidden_layers",
        before="shared encoder.embed_tokens encoder.embed_positions encoder.layernorm_embedding "
        "embeddings pre_layrnorm",
        after="encoder.layer_norm final_layer_norm post_layernorm head",
        roots=("", "model."),
    ),
    # BART's decoder, and OPT.
    *_family(
        "decoder.layers",
        counts="decoder_layers num_hidden_layers",
        before="shared decoder.embed_tokens decoder.embed_positions decoder.layernorm_embedding decoder.project_in",
        after="decoder.layer_norm decoder.final_layer_norm decoder.project_out",
        roots=("", "model."),
    ),
    # BERT, RoBERTa, ELECTRA and ViT; DistilBERT.
    *_family(
        "encoder.layer",
        counts="num_hidden_layers",
        before="embeddings embeddings_project",
        after="layernorm pooler",
        roots=("", "bert.", "roberta.", "electra.", "vit.", "deit."),
    ),
    *_family("transformer.layer", counts="n_layers", before="embeddings", after="", roots=("", "distilbert.")),
    # Llama, Mistral, Mixtral, Qwen, Gemma, Phi and GPT-NeoX (Pythia); the text of LLaVA, Gemma 3 and Qwen-VL.
    *_family(
        "layers",
        counts="text_config.num_hidden_layers num_hidden_layers",
        before="embed_tokens embed_in",
        after="norm final_layernorm final_layer_norm",
        roots=("", "model.", "gpt_neox.", "transformer.", "model.language_model.", "language_model.model."),
    ),
    # GPT-2, Falcon, GPT-J and BLOOM.
    *_family(
        "h",
        counts="n_layer num_hidden_layers",
        before="wte wpe word_embeddings word_embeddings_layernorm",
        after="ln_f",
        roots=("", "transformer."),
    ),
)
# Where a config declares the blocks of a list that only the user's pattern knows.
_COUNTS_OF_A_PATTERN = ("num_hidden_layers", "n_layer", "num_layers")
# Bounded and ASCII: `\d` takes the digits of every script, `int` any length.
_INDEX = re.compile("[0-9]{1,6}")
_MOST_BLOCKS = 10**6
_LISTED = re.compile(rf"({'|'.join(re.escape(blocks.path) for blocks in BLOCK_LISTS)})\.([^.]*)")


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in the model."""

    stack: str
    """Its block list, e.g. `model.layers` or `encoder.block`; the nearest one for tensors outside the blocks."""
    block: int | None
    """The 0-based index of its block, None outside the blocks."""
    blocks: int
    """The number of blocks L of that list."""
    side: Side
    """before: what feeds the first block; after: final norm, pooler, heads; unknown: outside, not declared where."""


@dataclass(frozen=True)
class Depths:
    """The place of every tensor, and the block lists of the model, in the order in which it runs them."""

    place: Mapping[str, Place]
    stacks: Mapping[str, int]


def find_depths(names: Iterable[str], config: Mapping[str, Any], pattern: str | None = None) -> Depths:
    """Return the place of every tensor of a model; each block list has a depth of its own.

    Args:
        names: the checkpoint's tensor names.
        config: its config.json; the number of blocks it declares must be the number found.
        pattern: a regular expression, matched from the start of the name, whose first group is the block index;
            for layouts that are not known here. The model then has one block list, named by the pattern, and nothing
            is known about the side of the tensors outside it.

    Raises:
        UserError: no list fits, the user's pattern is not one, an index is not a number, or a count disagrees with
            the config.
    """
    names = list(names)
    lists = BLOCK_LISTS if pattern is None else (BlockList(pattern, _COUNTS_OF_A_PATTERN),)
    inside = _listed(names) if pattern is None else _matched(names, pattern)
    if not inside:
        raise _unknown_layout(names, config, pattern)
    indices: dict[str, set[int]] = {}
    for path, index in inside.values():
        indices.setdefault(path, set()).add(index)
    found = {blocks: len(indices[blocks.path]) for blocks in lists if blocks.path in indices}
    problems = [problem for blocks in found for problem in _miscounted(blocks, indices[blocks.path], config)]
    if problems:
        raise UserError(problems)
    stacks = {blocks.path: count for blocks, count in found.items()}
    places = {name: Place(path, index, stacks[path], "in") for name, (path, index) in inside.items()}
    tied = not any(name.removesuffix(".weight").rpartition(".")[2] in TOKEN_EMBEDDINGS for name in names)
    return Depths({name: places.get(name) or _outside(name, found, tied) for name in names}, stacks)


def with_declared_blocks(names: Iterable[str], config: Mapping[str, Any]) -> list[str]:
    """Return the names of some of a model's tensors, with stand-ins for what the config says is there as well.

    Adapters may leave out blocks and embeddings; a depth is a place among all blocks.
    """
    found = list(names)
    inside = {path for path, _ in _listed(found).values()}
    for blocks in BLOCK_LISTS:
        _, declared = _declared(blocks.counts, config) if blocks.path in inside else ("", None)
        if isinstance(declared, int) and 0 < declared < _MOST_BLOCKS:
            found += [f"{blocks.path}.{index}.declared" for index in range(declared)]
    return [*found, f"{TOKEN_EMBEDDINGS[0]}.declared.{TOKEN_EMBEDDINGS[0]}"]


def _listed(names: Sequence[str]) -> dict[str, tuple[str, int]]:
    """Return list and index of the tensors that lie in a list of the table."""
    found = ((name, _LISTED.match(name)) for name in names)
    return {name: (match[1], _index(name, match[2])) for name, match in found if match}


def _matched(names: Sequence[str], pattern: str) -> dict[str, tuple[str, int]]:
    """Return list (the pattern itself) and index of the tensors that match the user's pattern."""
    compiled = _compile(pattern)
    found = ((name, compiled.match(name)) for name in names)
    return {name: (pattern, _index(name, match[1])) for name, match in found if match and match[1] is not None}


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        compiled = re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise fail("not a regular expression", where="--layers", got=f"{pattern!r}: {error}") from error
    if compiled.groups < 1:
        raise fail("the pattern has no group", where="--layers", expected=r"(\d+) for the index", got=pattern)
    return compiled


def _index(name: str, text: str) -> int:
    if not _INDEX.fullmatch(text):
        raise fail(
            "the number of the block is not one",
            where=_shown(name),
            expected="up to six digits",
            got=_shown(text),
            remedy="the checkpoint is damaged, or --layers has a pattern to name",
        )
    return int(text)


def _miscounted(blocks: BlockList, found: set[int], config: Mapping[str, Any]) -> list[Problem]:
    """Return what is wrong with the indices found in one list: they must be 0 to L-1, L as the config declares."""
    key, declared = _declared(blocks.counts, config)
    if declared is None:
        declared = len(found)
    if isinstance(declared, bool) or not isinstance(declared, int) or declared < 1:
        what = "the config's number of blocks is not a positive whole number"
        return [Problem(what, where=blocks.path, expected=f"{key}: {len(found)}", got=f"{key}: {_shown(declared)}")]
    # Not list(range(declared)): the config may declare any number.
    if len(found) == declared and max(found) == declared - 1:
        return []
    return [
        Problem(
            f"the config declares {declared} blocks, the tensors show others" if key else "blocks are missing",
            where=blocks.path,
            expected=f"blocks 0 to {declared - 1}",
            got=f"{len(found)} blocks, {min(found)} to {max(found)}",
            remedy="the checkpoint is not whole, or --layers has another pattern to name",
        )
    ]


def _declared(keys: Sequence[str], config: Mapping[str, Any]) -> tuple[str, Any]:
    """Return the first of the dotted keys that the config has, with its value; "" and None where it has none."""
    for key in keys:
        value: Any = config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is not None:
            return key, value
    return "", None


def _outside(name: str, found: dict[BlockList, int], tied: bool) -> Place:
    """Return the place of a tensor outside the blocks; heads hang on the last list."""
    for blocks, count in found.items():
        if _is_of(name, blocks.before):
            return Place(blocks.path, None, count, "before")
    for blocks, count in reversed(found.items()):
        if _is_of(name, blocks.after):
            return Place(blocks.path, None, count, "before" if tied and name in TIED_HEADS else "after")
    parts = name.split(".")
    nearest = max(found, key=lambda blocks: len(commonprefix([parts, blocks.path.split(".")])))
    return Place(nearest.path, None, found[nearest], "unknown")


def _is_of(name: str, modules: Iterable[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _unknown_layout(names: Sequence[str], config: Mapping[str, Any], pattern: str | None) -> UserError:
    seen = [name for name in names if re.search(r"\.[0-9]+\.", name)] or names
    return fail(
        "the model's layout is not known" if pattern is None else f"`--layers {pattern}` matches no tensor",
        where=_shown(config.get("model_type", "model")),
        expected="names such as model.layers.0.mlp.up_proj.weight",
        got=", ".join(map(_shown, seen[:3])) + (", ..." if len(seen) > 3 else "") if names else "no tensors",
        remedy=r"pass --layers with the block list's pattern, e.g. --layers 'decoder\.blocks\.(\d+)\.'",
    )


def _shown(value: object) -> str:
    """Return a name or value as an error may print it, whatever a file has in that place."""
    text = value if isinstance(value, str) and value.isprintable() else repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."

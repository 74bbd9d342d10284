"""The names that families of models give their lists of blocks, and what kind of module a name means."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True)
class BlockList:
    """A family's names for one list of blocks and the modules around it.

    Names are whole modules from the start of the tensor's name: `model.norm` matches itself and `model.norm.weight`,
    not `model.normal`; `experts.0` inside `model.layers.3` is in block 3.
    """

    path: str
    """The list, e.g. `model.layers` for `model.layers.0.` to `model.layers.{L-1}.`."""
    before: tuple[str, ...] = ()
    """Modules that run before the first block."""
    after: tuple[str, ...] = ()
    """Modules that run after the last block."""


# Modules that a task adds after the blocks, in any family.
HEADS: tuple[str, ...] = (
    *("lm_head", "language_model.lm_head", "embed_out", "final_logits_bias", "cls"),
    *("score", "classifier", "pre_classifier", "classification_head", "qa_outputs", "pooler"),
    *("logit_scale", "logit_bias"),
)
# In a file without token embeddings the head's matrix is the tied embedding, saved under the head's name.
TIED_HEADS: tuple[str, ...] = ("lm_head.weight", "language_model.lm_head.weight", "embed_out.weight")
TOKEN_EMBEDDINGS: tuple[str, ...] = ("embed_tokens", "embed_in", "wte", "word_embeddings", "shared")


# The list, the modules before it, those after it, and the roots: what wrapping classes put before all of these names.
# In the order in which a model runs the lists: vision before text, encoders before decoders.
_TABLE = (
    # CLIP and SigLIP; "pre_layrnorm" is how CLIP spells it.
    (
        "text_model.encoder.layers",
        "text_model.embeddings",
        "text_model.final_layer_norm text_model.head text_projection",
    ),
    (
        "vision_model.encoder.layers",
        "vision_model.embeddings vision_model.pre_layrnorm",
        "vision_model.post_layernorm vision_model.head visual_projection",
    ),
    # Vision towers of LLaVA and Gemma 3, by their present and former names, and of Qwen-VL.
    (
        "vision_tower.encoder.layers",
        "vision_tower.embeddings vision_tower.pre_layrnorm",
        "vision_tower.post_layernorm vision_tower.head multi_modal_projector",
        ("", "model."),
    ),
    (
        "vision_tower.vision_model.encoder.layers",
        "vision_tower.vision_model.embeddings vision_tower.vision_model.pre_layrnorm",
        "vision_tower.vision_model.post_layernorm vision_tower.vision_model.head multi_modal_projector",
        ("", "model."),
    ),
    (
        "visual.blocks",
        "visual.patch_embed visual.pos_embed",
        "visual.merger visual.deepstack_merger_list",
        ("", "model."),
    ),
    # T5 and mT5.
    ("encoder.block", "shared encoder.embed_tokens", "encoder.final_layer_norm", ("", "transformer.")),
    ("decoder.block", "shared decoder.embed_tokens", "decoder.final_layer_norm", ("", "transformer.")),
    # BART's encoder; without a root also each of CLIP's encoders, saved alone.
    (
        "encoder.layers",
        "shared encoder.embed_tokens encoder.embed_positions encoder.layernorm_embedding embeddings pre_layrnorm",
        "encoder.layer_norm final_layer_norm post_layernorm head",
        ("", "model."),
    ),
    # BART's decoder, and OPT.
    (
        "decoder.layers",
        "shared decoder.embed_tokens decoder.embed_positions decoder.layernorm_embedding decoder.project_in",
        "decoder.layer_norm decoder.final_layer_norm decoder.project_out",
        ("", "model."),
    ),
    # BERT, RoBERTa, ELECTRA and ViT; DistilBERT stands below.
    (
        "encoder.layer",
        "embeddings embeddings_project",
        "layernorm pooler",
        ("", "bert.", "roberta.", "electra.", "vit.", "deit."),
    ),
    # XLM and FlauBERT number the parts of a block in lists of their own.
    ("attentions", "embeddings position_embeddings lang_embeddings layer_norm_emb", "", ("", "transformer.")),
    ("layer_norm1", "", "", ("", "transformer.")),
    ("ffns", "", "pred_layer", ("", "transformer.")),
    ("layer_norm2", "", "", ("", "transformer.")),
    ("transformer.layer", "embeddings", "", ("", "distilbert.")),
    # Llama, Mistral, Mixtral, Qwen, Gemma, Phi and GPT-NeoX (Pythia); the text of LLaVA, Gemma 3 and Qwen-VL.
    (
        "layers",
        "embed_tokens embed_in",
        "norm final_layernorm final_layer_norm",
        ("", "model.", "gpt_neox.", "transformer.", "model.language_model.", "language_model.model."),
    ),
    # GPT-2, Falcon, GPT-J and BLOOM.
    ("h", "wte wpe word_embeddings word_embeddings_layernorm", "ln_f", ("", "transformer.")),
)


def _lists(path: str, before: str, after: str, roots: Sequence[str] = ("",)) -> tuple[BlockList, ...]:
    """Return a row's list below each root; heads come after the blocks."""
    return tuple(
        BlockList(
            root + path,
            tuple(root + name for name in before.split()),
            (*(root + name for name in after.split()), *HEADS),
        )
        for root in roots
    )


BLOCK_LISTS: tuple[BlockList, ...] = tuple(blocks for row in _TABLE for blocks in _lists(*row))

# The names that models give their blocks' lists, at the end of the list's path.
BLOCK_NAMES = re.compile(r"(?:\w+_)?(?:layers?|blocks?)|h|resblocks|encoders")
# Numbered modules that are no blocks, by the path: they run once, side by side, or beside the blocks.
OTHER_LISTS = re.compile(
    r"(?:^|\.)(?:\w*(?:conv|expert|merger|head|norm|proj|mlp|embed|bias|downsampl|upsampl|pool|classifier)\w*|down|up|ups)$|"
    r"(?:^|\.)(?:mtp|\w*quantizer\w*|\w*codebook\w*)(?:\.|$)"
)
# Modules whose layers are single matrices.
SMALL_NETWORKS = re.compile(r"(?:aligner|connector|adapter|merger|head|mlp|proj\w*)\.\w+$")
# Usual modules before and after blocks, for lists without a row.
BEFORE_BLOCKS = re.compile(r"\w*embed\w*|wte|wpe|shared|patch\w*|conv1|pre_layrnorm|ln_pre|layernorm_pre|cls_token")
AFTER_BLOCKS = re.compile(
    r"(?:final_|post_|out_|output_)?(?:layer_?)?norm|norm_f|ln_f|ln_post|layernorm_post|"
    r"pooler|head|\w*project\w*|connector|merger|aligner"
)

# The kinds of modules that a schedule can scale apart.
KINDS = ("attention", "mlp", "norm", "embeddings", "head", "other")

# Each matches a whole part of a name, between dots.
_NORM = re.compile(r"\w*norm\w*|\w*ln|ln(?:_\w+|\d+)|bn\d*", re.IGNORECASE)
_ATTENTION = re.compile(
    r"(?!\w*residual)\w*(?:attn|attention)\w*|[qkvo]_proj|w(?:q|k|v|qkv)|(?:q|k|v|out)_lin|\w*(?:query|qkv)\w*",
    re.IGNORECASE,
)
# "intermediate" and "output" are the two halves in BERT, "wi" and "wo" in T5, "lin1" and "lin2" in XLM.
_MLP = re.compile(
    r"(?!\w*residual)\w*(?:mlp|ffn|feed_?forward|moe|expert)\w*|router|gate|ff|fc\w{0,4}|lin[12]|linear_?[12]|"
    r"intermediate|output|dense_?relu\w*|dense_(?:h_to_4h|4h_to_h)|w[io12]|w[io]_\d|(?:gate|up|down|gate_up)_proj",
    re.IGNORECASE,
)
_HEAD = re.compile(r"\w*heads?|\w*classifier|output_layer|pred_layer|generator|predictions")
# A head at the top of Git, BioGPT and Whisper; embeddings of CTRL and XLNet.
_TOP_HEAD = re.compile(r"output(?:_projection)?|proj_out")
_EMBEDDINGS = re.compile(rf"{BEFORE_BLOCKS.pattern}|\w+_emb|w")


@lru_cache(maxsize=1 << 16)
def kind_of(name: str, side: str) -> str:
    """Return the kind of module that a tensor belongs to, one of `KINDS`.

    A norm is a norm wherever it stands, also inside attention (`q_norm`) or a head. In a block, or another numbered
    list, the outermost module that says so decides: `attention.output.dense` is attention, `output.dense` mlp. A
    mixture of experts is mlp with its router; a linear attention is attention. Convolutions, state spaces (Mamba) and
    projectors are other. The tensor's `side` is that of its `Place`.
    """
    parts = name.split(".")
    first = next((place for place, part in enumerate(parts) if part.isdigit()), len(parts))
    inside = parts[first + 1 :]
    # XLM's lists themselves are `attentions` and `ffns`.
    searched = [*inside, *parts[first - 1 : first]] if side == "in" else inside
    words = [part for part in (inside if side == "in" else parts) if not part.isdigit()]
    if any(_NORM.fullmatch(word) for word in [part for part in parts if not part.isdigit()][-2:]):
        return "norm"
    if side == "before" and name in TIED_HEADS:
        return "embeddings"
    if side != "in" and (_TOP_HEAD.fullmatch(parts[0]) or any(f"{name}.".startswith(f"{head}.") for head in HEADS)):
        return "head"
    for part in searched:
        if _ATTENTION.fullmatch(part):
            return "attention"
        if _MLP.fullmatch(part):
            return "mlp"
    if side != "in" and any(map(_HEAD.fullmatch, words)):
        return "head"
    return "embeddings" if any(map(_EMBEDDINGS.fullmatch, words)) else "other"

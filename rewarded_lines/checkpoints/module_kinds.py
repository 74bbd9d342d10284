"""Tensor name → kind of module: attention, mlp, norm, embeddings, head or other."""

from __future__ import annotations

import re
from functools import lru_cache

from rewarded_lines.checkpoints.families import BEFORE_BLOCKS, HEADS, TIED_HEADS

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

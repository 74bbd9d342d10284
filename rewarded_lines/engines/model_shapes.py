"""What a model takes in memory, read from its config and the headers of its weights; no weights are read.

Three sources, the first that is there: a folder's files, a Hub id's files (the headers alone are fetched), and the name
of a size such as `7B`, which stands for the published Llama of that name, or one at most 15 % off.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rewarded_lines.checkpoints.dtypes import BF16, DTYPES, FLOATS, DType
from rewarded_lines.checkpoints.families import TIED_HEADS, TOKEN_EMBEDDINGS
from rewarded_lines.checkpoints.headers import TensorInfo, quantized
from rewarded_lines.checkpoints.reader import Checkpoint, read_config, resolve_folder
from rewarded_lines.engines.kv_cache import Config, KvLayers, kv_layers, text_config
from rewarded_lines.errors import UserError, fail
from rewarded_lines.extras import install, is_installed
from rewarded_lines.references import looks_local

_SIZE = re.compile(r"(?:llama-?)?(\d+(?:\.\d+)?)([bm])", re.IGNORECASE)
_BLOCK = re.compile(r"\.\d+\.")
# Linear layers that tensor parallelism cuts by rows and by columns, as families name them.
_BY_ROWS = re.compile(
    r"\.([qkv]|qkv|gate|up|gate_up|[qkv]_b|kv_b)_proj\.|\.(c_attn|c_fc|query_key_value|dense_h_to_4h|fc1|w[13])\."
)
_BY_COLUMNS = re.compile(r"\.((o|down|out|c)_proj|dense_4h_to_h|attention\.dense|fc2|fc_out|w2)\.")
# What a plan cannot do without.
_NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads")
# A size may differ so far from a published model.
_OFF = 0.15
_KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
# The published Llamas: hidden, intermediate, blocks, heads, key-value heads, vocabulary, whether the head is tied.
_LLAMAS = {
    "Llama-3.2-1B": (2048, 8192, 16, 32, 8, 128_256, True),
    "Llama-3.2-3B": (3072, 8192, 28, 24, 8, 128_256, True),
    "Llama-2-7B": (4096, 11_008, 32, 32, 32, 32_000, False),
    "Llama-3.1-8B": (4096, 14_336, 32, 32, 8, 128_256, False),
    "Llama-2-13B": (5120, 13_824, 40, 40, 40, 32_000, False),
    "Llama-3.1-70B": (8192, 28_672, 80, 64, 8, 128_256, False),
    "Llama-3.1-405B": (16_384, 53_248, 126, 128, 8, 128_256, False),
}

Tensors = Mapping[str, TensorInfo]


@dataclass(frozen=True)
class ModelShape:
    """The numbers of a model that decide how much memory it takes.

    Attributes:
        name: the folder, the Hub id, or the published model that a size stands for.
        parameters: how many; tied heads count once.
        stored: bytes of the weights as their files hold them.
        largest: bytes of the largest tensor.
        layers: blocks.
        hidden: width of the residual stream.
        inner: values that the widest step of a block makes for a token.
        vocabulary: tokens.
        heads: of attention; tensor parallelism divides them.
        edges: Σ (rows + columns) over the linear layers in blocks. A LoRA of rank r has r · edges parameters.
        undivided: the part of `edges` that tensor parallelism leaves whole on every GPU.
        towers: it also reads images or sound.
        cache: the layers that keep keys and values.
        notes: what is an estimate, and why.
    """

    name: str
    parameters: int
    stored: int
    largest: int
    layers: int
    hidden: int
    inner: int
    vocabulary: int
    heads: int
    edges: int
    undivided: int
    towers: bool
    cache: tuple[KvLayers, ...]
    notes: tuple[str, ...] = ()


def read_shape(reference: str) -> ModelShape:
    """Return the shape of a folder, a Hub id, or a size such as `7B` or `llama-7b`.

    Raises:
        UserError: neither of them, or its files cannot be read.
    """
    size = _SIZE.fullmatch(reference)
    if size and not Path(reference).exists():
        return named_shape(reference, float(size[1]) * (1e9 if size[2] in "bB" else 1e6))
    try:
        folder = resolve_folder(reference, weights=False)
    except UserError as error:
        more = "or a size such as 7B"
        raise UserError(replace(one, remedy=f"{one.remedy}, {more}") for one in error.problems) from error
    return shape_from(reference, _whole_config(folder), _tensor_shapes(reference, folder))


def named_shape(reference: str, parameters: float) -> ModelShape:
    """Return the shape of the published Llama whose name or count is nearest to a number of parameters.

    Raises:
        UserError: none is within 15 % of it.
    """
    shapes = {name: shape_from(name, *_llama(name)) for name in _LLAMAS}
    sizes = {name: (shape.parameters, 1e9 * float(_size_in(name)[:-1])) for name, shape in shapes.items()}
    off = {name: min(abs(parameters / size - 1) for size in both) for name, both in sizes.items()}
    name = min(off, key=lambda one: off[one])
    if off[name] > _OFF:
        known = ", ".join(map(_size_in, _LLAMAS))
        raise fail(
            "no published Llama is about that large", where=reference, expected=known, remedy="give a folder or Hub id"
        )
    return shapes[name]


def _size_in(name: str) -> str:
    return name.rpartition("-")[2]


def shape_from(name: str, config: Config, tensors: Tensors) -> ModelShape:
    """Return the shape that a config and the shapes of tensors say.

    Raises:
        UserError: the config has no blocks with attention.
    """
    text = text_config(config)
    if lacking := [key for key in _NEEDED if type(text.get(key)) is not int or text[key] < 1]:
        expected, got = ", ".join(_NEEDED), f"no number for {', '.join(lacking)}"
        remedy = "plans are made for models whose blocks have attention"
        if not is_installed("transformers"):
            remedy = f"{install('eval')}, which knows the defaults of the model's class"
        raise fail("the config leaves out what is needed", where=name, expected=expected, got=got, remedy=remedy)
    hidden, heads = int(text["hidden_size"]), int(text["num_attention_heads"])
    cache, notes = kv_layers(config)
    tied = text.get("tie_word_embeddings", config.get("tie_word_embeddings", False))
    # A tied head may be saved a second time; without the embeddings it stands for them.
    twice = tied and any(part in key for key in tensors for part in TOKEN_EMBEDDINGS)
    kept = [info for key, info in tensors.items() if not (twice and key in TIED_HEADS)]
    linear = [info for info in kept if len(info.shape) == 2 and _BLOCK.search(info.name)]
    return ModelShape(
        name=name,
        parameters=sum(info.elements for info in kept),
        stored=sum(info.bytes for info in kept),
        largest=max(info.bytes for info in kept),
        layers=int(text["num_hidden_layers"]),
        hidden=hidden,
        inner=2 * gates(text),
        vocabulary=int(text.get("vocab_size", config.get("vocab_size", 0))),
        heads=heads,
        edges=sum(sum(info.shape) for info in linear),
        undivided=sum(map(_undivided, linear)),
        towers=text is not config,
        cache=cache,
        notes=notes,
    )


def _undivided(info: TensorInfo) -> int:
    """Return what of rows + columns of a LoRA's factors every GPU has whole, as vLLM cuts them.

    A layer that is cut by rows has a whole A, one that is cut by columns a whole B, another one both.
    """
    rows, columns = info.shape
    return columns if _BY_ROWS.search(info.name) else rows if _BY_COLUMNS.search(info.name) else rows + columns


def gates(text: Config) -> int:
    """Return the gates that the widest block makes for a token, those of every expert that the token visits."""
    dense = text.get("intermediate_size") or 4 * text["hidden_size"]
    dense = max(dense) if isinstance(dense, list) else dense
    experts = text.get("num_experts_per_tok") or 0
    visited = experts * (text.get("moe_intermediate_size") or dense) if experts else 0
    return max(int(dense), int(visited))


def whole_text(config: Any) -> dict[str, Any]:
    """Return the language model's part of a config of transformers, its values under the usual names, too."""
    known = config.get_text_config()
    content: dict[str, Any] = known.to_dict()
    return content | {name: content[own] for name, own in known.attribute_map.items() if own in content}


def _llama(name: str) -> tuple[dict[str, Any], Tensors]:
    """Return config and tensors of a published Llama."""
    *sizes, vocabulary, tied = _LLAMAS[name]
    config = dict(zip(_KEYS, sizes, strict=True)) | {"vocab_size": vocabulary, "tie_word_embeddings": tied}
    hidden, inner, layers, heads, kv_heads = sizes
    kv = hidden // heads * kv_heads
    block = {
        **{f"{part}_proj": (hidden, hidden) for part in "qo"},
        **{f"{part}_proj": (kv, hidden) for part in "kv"},
        **{f"{part}_proj": (inner, hidden) for part in ("gate", "up")},
        **{"down_proj": (hidden, inner), "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)},
    }
    tensors = {f"model.layers.{layer}.{part}.weight": shape for layer in range(layers) for part, shape in block.items()}
    ends = dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), (vocabulary, hidden))
    return config, _described({**tensors, **ends, "model.norm.weight": (hidden,)}, BF16)


def _whole_config(folder: Path) -> Config:
    """Return the language model's config, with the defaults of its class, which the file may leave out."""
    config = read_config(folder)
    if is_installed("transformers"):
        from rewarded_lines.engines.tokenizers import load_config

        try:
            whole = load_config(str(folder))
        except UserError:
            # A class that transformers does not know: the file alone has to do.
            pass
        else:
            text = {"tie_word_embeddings": config.get("tie_word_embeddings", False), **whole_text(whole)}
            return text if whole.get_text_config() is whole else {"text_config": text}
    return config


def _tensor_shapes(reference: str, folder: Path) -> Tensors:
    """Return the shapes of a model's tensors: of its files, its headers on the Hub, or what its class would make."""
    if any(folder.glob("*.safetensors")):
        return Checkpoint(folder).tensors
    return (_hub_shapes(reference) if not looks_local(reference) else {}) or _shapes_of_class(folder)


def _hub_shapes(reference: str) -> Tensors:
    """Return the shapes in the headers of a Hub id's weights, {} if it has no safetensors."""
    from huggingface_hub import get_safetensors_metadata
    from huggingface_hub.errors import NotASafetensorsRepoError
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    try:
        files = get_safetensors_metadata(reference).files_metadata.values()
    except NotASafetensorsRepoError:
        return {}
    except Exception as error:  # noqa: BLE001 - networks fail in the ways of four libraries, none of them ours
        got = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise fail("the headers of its weights cannot be read", where=reference, got=got) from error
    stored = {name: info for file in files for name, info in file.tensors.items()}
    unknown = sorted({info.dtype for info in stored.values()} - DTYPES.keys())
    if unknown:
        raise quantized(f"tensors are of type {', '.join(unknown)[:60]}", Path(reference))
    return {name: TensorInfo(name, DTYPES[info.dtype], tuple(info.shape)) for name, info in stored.items()}


def _shapes_of_class(folder: Path) -> Tensors:
    """Return the shapes that the model's class makes from the config, without memory for them."""
    if not (is_installed("torch") and is_installed("transformers")):
        remedy = f"{install('eval')}, which knows the model's class, or give a size such as 7B"
        raise fail("no safetensors there to read the headers of", where=str(folder), remedy=remedy)
    import torch
    from transformers import AutoModelForCausalLM

    from rewarded_lines.engines.tokenizers import load_config

    config = load_config(str(folder))
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001 - every class fails in its own way
        what = "no safetensors there, and transformers makes no language model of the config"
        got = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise fail(what, where=str(folder), got=got, remedy="save its weights as safetensors") from error
    kind = str(model.dtype).removeprefix("torch.")
    return _described({name: tuple(weight.shape) for name, weight in model.named_parameters()}, FLOATS[kind])


def _described(shapes: Mapping[str, tuple[int, ...]], kind: DType) -> Tensors:
    return {name: TensorInfo(name, kind, shape) for name, shape in shapes.items()}

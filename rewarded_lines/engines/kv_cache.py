"""How many bytes the keys and values of a model's attention take, from its config alone.

An ordinary layer keeps, for every token, a key and a value of `head_dim` numbers in each of its key-value heads:

    bytes = 2 · kv_heads · head_dim · bytes per number · tokens            (summed over the layers)

Grouped-query attention has fewer key-value heads than heads. A layer with a sliding window keeps the last `window`
tokens. Multi-head latent attention (DeepSeek) keeps one latent of `kv_lora_rank + qk_rope_head_dim` numbers instead of
keys and values. Blocks of an engine round each of these up to whole blocks, which is not counted here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Config = Mapping[str, Any]
_SECTIONS = ("text_config", "language_config", "llm_config")
_FULL, _WINDOWED = ("full_attention", "attention"), ("sliding_attention", "chunked_attention")


@dataclass(frozen=True)
class KvLayers:
    """Layers that keep the same amount.

    Attributes:
        layers: how many.
        heads: key-value heads, which tensor parallelism divides; 1 for a latent, which every GPU keeps whole.
        numbers: that a head keeps for a token.
        window: tokens that are kept at most; None: all.
    """

    layers: int
    heads: int
    numbers: int
    window: int | None = None

    def bytes_of(self, tokens: int, itemsize: float, gpus: int = 1) -> int:
        """Return the bytes for one sequence on each of `gpus`; heads that cannot be divided are kept several times."""
        kept = tokens if self.window is None else min(tokens, self.window)
        return round(self.layers * -(-self.heads // gpus) * self.numbers * itemsize * kept)


def kv_bytes(cache: tuple[KvLayers, ...], tokens: int, itemsize: float, gpus: int = 1) -> int:
    """Return the bytes that one sequence of `tokens` takes on each of `gpus`."""
    return sum(layers.bytes_of(tokens, itemsize, gpus) for layers in cache)


def text_config(config: Config) -> Config:
    """Return the part of a config that describes the language model."""
    return next((config[name] for name in _SECTIONS if isinstance(config.get(name), Mapping)), config)


def kv_layers(config: Config) -> tuple[tuple[KvLayers, ...], tuple[str, ...]]:
    """Return what a config's layers keep, and a note where that is only an upper bound."""
    text = text_config(config)
    kinds = _kinds(text)
    # Layers that read the keys and values of earlier ones keep none (Gemma 3n, Gemma 4).
    kinds = kinds[: len(kinds) - (text.get("num_kv_shared_layers") or 0)]
    windowed = sum(kind in _WINDOWED for kind in kinds)
    unknown = [kind for kind in kinds if kind not in (*_FULL, *_WINDOWED)]
    full = _heads(text, whole=True)
    window = text.get("attention_chunk_size") if "chunked_attention" in kinds else text.get("sliding_window")
    found = [KvLayers(len(kinds) - windowed, *full)] if len(kinds) > windowed else []
    if windowed:
        found.append(KvLayers(windowed, *_heads(text, whole=False), window))
    notes = []
    if unknown:
        listed = ", ".join(dict.fromkeys(unknown))
        notes.append(f"KV cache: an upper bound; {len(unknown)} layers ({listed}) are counted as full attention")
    if text.get("index_head_dim"):
        notes.append("KV cache: the keys of the sparse attention's index are not counted")
    return tuple(found), tuple(notes)


def _heads(text: Config, whole: bool) -> tuple[int, int]:
    """Return key-value heads, and numbers that each keeps for a token; layers that see the `whole` text may differ."""
    if text.get("kv_lora_rank"):
        return 1, int(text["kv_lora_rank"]) + int(text.get("qk_rope_head_dim") or 0)
    heads = int(text["num_attention_heads"])
    kept = int(text.get("num_key_value_heads") or heads)
    size = int(text.get("head_dim") or int(text["hidden_size"]) // heads)
    if whole:
        kept, size = int(text.get("num_global_key_value_heads") or kept), int(text.get("global_head_dim") or size)
    return kept, 2 * size


def _kinds(text: Config) -> list[str]:
    """Return the kind of every layer: as the config lists them, or from the older keys for windows."""
    count = int(text["num_hidden_layers"])
    listed = text.get("layer_types") or text.get("layers_block_type")
    if listed:
        return [str(kind) for kind in listed]
    if not text.get("sliding_window") or text.get("use_sliding_window") is False:
        return ["full_attention"] * count
    # Gemma 2 and 3: every second or sixth layer sees the whole text. Qwen2: the first `max_window_layers` do.
    if period := text.get("sliding_window_pattern"):
        return ["sliding_attention" if (layer + 1) % period else "full_attention" for layer in range(count)]
    first = int(text.get("max_window_layers") or 0) if text.get("use_sliding_window") else 0
    return ["full_attention"] * min(first, count) + ["sliding_attention"] * (count - min(first, count))

"""What the benchmark merges: Llama-shaped checkpoints and LoRA adapters of random bfloat16 weights, made with little
memory. numpy has no bfloat16, so files are written by hand: a header of JSON, then 16-bit patterns."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

SHARD_BYTES = 1_000_000_000
_BLOCK = 1 << 21  # values made at a time: this process must stay small, its children's peak is measured from there
_SPREAD, _STEP = 0.02, 0.002

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Llama:
    """The numbers that shape a Llama."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int = 32_000

    def linears(self) -> dict[str, tuple[int, int]]:
        """Return the linear layers of one block, by name: outputs, inputs."""
        kv = self.hidden // self.heads * self.kv_heads
        attention = {"q": self.hidden, "k": kv, "v": kv, "o": self.hidden}
        return {
            **{f"self_attn.{name}_proj": (rows, self.hidden) for name, rows in attention.items()},
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Return every tensor's shape by name, head and embedding apart, in the order of the model."""
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab, self.hidden)}
        for layer in range(self.layers):
            block = f"model.layers.{layer}"
            shapes |= {f"{block}.{name}.weight": shape for name, shape in self.linears().items()}
            for norm in ("input_layernorm", "post_attention_layernorm"):
                shapes[f"{block}.{norm}.weight"] = (self.hidden,)
        return shapes | {"model.norm.weight": (self.hidden,), "lm_head.weight": (self.vocab, self.hidden)}

    def parameters(self) -> int:
        """Return the number of weights."""
        return sum(map(math.prod, self.tensors().values()))

    def config(self) -> dict[str, object]:
        """Return the content of config.json."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocab,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "hidden_act": "silu",
            "initializer_range": _SPREAD,
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "torch_dtype": "bfloat16",
        }


LLAMA_2_7B = Llama(4096, 11008, 32, 32, 32)


def shape_of(parameters: float) -> Llama:
    """Return a Llama of about so many weights: TinyLlama's blocks, narrower ones for small trials."""
    for shrink in (1, 4, 16):
        model = Llama(2048 // shrink, 5632 // shrink, 0, 32 // shrink, max(1, 4 // shrink))
        bare = model.parameters()
        block = replace(model, layers=1).parameters() - bare
        layers = round((parameters - bare) / block)
        if layers >= 4:
            break
    return replace(model, layers=max(2, layers))


def write_checkpoint(folder: Path, llama: Llama, policy: int = 0, empty: bool = False) -> Path:
    """Write a sharded checkpoint: the base for 0, a small random step away from it for any other number.

    An `empty` one is all zeros, as holes in the files: they take no room on the disk.
    """
    folder.mkdir(parents=True)
    shards = _shards(llama.tensors())
    weight_map = {}
    for index, shapes in enumerate(shards):
        name = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(shapes, name)
        _write_file(folder / name, shapes, index, policy, empty)
    index_file = {"metadata": {"total_size": 2 * llama.parameters()}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_file))
    (folder / "config.json").write_text(json.dumps(llama.config(), indent=2))
    return folder


def write_adapter_base(folder: Path, llama: Llama) -> Path:
    """Write what merging adapters needs of their base: its config alone, none of its weights."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(llama.config(), indent=2))
    return folder


def write_adapter(folder: Path, base: Path, llama: Llama, policy: int, rank: int = 16) -> Path:
    """Write a LoRA adapter over all linear layers, as PEFT does."""
    folder.mkdir(parents=True)
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(llama.layers):
        for name, (rows, columns) in llama.linears().items():
            where = f"base_model.model.model.layers.{layer}.{name}"
            shapes[f"{where}.lora_A.weight"] = (rank, columns)
            shapes[f"{where}.lora_B.weight"] = (rows, rank)
    _write_file(folder / "adapter_model.safetensors", shapes, 0, policy)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": sorted(name.rpartition(".")[2] for name in llama.linears()),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))
    return folder


def read_headers(folder: Path) -> dict[str, np.memmap]:
    """Return the 16-bit patterns of every tensor in a folder, mapped, not read."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with open(file, "rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(size))
        for name, entry in header.items():
            if name != "__metadata__":
                start, end = entry["data_offsets"]
                found[name] = np.memmap(file, np.uint16, "r", 8 + size + start, ((end - start) // 2,))
    return found


def _shards(shapes: Shapes) -> list[dict[str, tuple[int, ...]]]:
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in shapes.items():
        if shards[-1] and 2 * sum(map(math.prod, [*shards[-1].values(), shape])) > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = shape
    return shards


def _write_file(path: Path, shapes: Shapes, seed: int, policy: int, empty: bool = False) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        if empty:
            file.truncate(file.tell() + offset)
            return
        for block in _values(offset // 2, seed, policy):
            file.write(block)


def _values(count: int, seed: int, policy: int) -> Iterator[memoryview]:
    """Yield random bfloat16 patterns; every policy of a seed takes its steps from the same base."""
    start, step = np.random.default_rng([seed, 0]), np.random.default_rng([seed, policy])
    for done in range(0, count, _BLOCK):
        size = min(_BLOCK, count - done)
        values = start.standard_normal(size, np.float32) * np.float32(_SPREAD)
        if policy:
            values += step.standard_normal(size, np.float32) * np.float32(_STEP)
        bits = values.view(np.uint32)
        yield memoryview(((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)).cast("B")

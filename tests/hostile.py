"""Checkpoints by hand whose values are as unkind to arithmetic as a file can hold, a few thousand in all."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from exact import FLOAT16, FLOAT32, Format, decode, encode
from safetensors import safe_open
from safetensors.torch import save_file

BLOCKS = 4
SHAPES = {
    "model.embed_tokens.weight": (40, 24),
    **{f"model.layers.{block}.input_layernorm.weight": (37,) for block in range(BLOCKS)},
    **{f"model.layers.{block}.mlp.up_proj.weight": (20, 24) for block in range(BLOCKS)},
    "model.norm.weight": (1,),
    "lm_head.weight": (40, 24),
}
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": BLOCKS,
    "vocab_size": 40,
    "tie_word_embeddings": False,
}
# The codes of every tensor, by name.
Codes = dict[str, np.ndarray]


@dataclass(frozen=True)
class Family:
    """A base and its policies: where they lie, in which formats, and every value."""

    folder: Path
    formats: tuple[Format, ...]
    codes: tuple[Codes, ...]

    @property
    def base(self) -> Path:
        return self.folder / "base"

    @property
    def policies(self) -> dict[str, Path]:
        return {f"p{row}": self.folder / f"p{row}" for row in range(1, len(self.formats))}

    def values(self, name: str) -> list[np.ndarray]:
        """Return a tensor's values in every input, base first, flat, as long doubles."""
        return [decode(codes[name].ravel(), kind) for codes, kind in zip(self.codes, self.formats, strict=True)]


def make_family(folder: Path, formats: Sequence[Format], seed: int = 0, gentle: bool = False) -> Family:
    """Save a base and policies of these formats, the base's first.

    Args:
        folder: gets `base`, `p1`, `p2` ...
        formats: of base and policies.
        seed: of the values.
        gentle: only values as training gives them.
    """
    generator = np.random.default_rng(seed)
    rows: list[Codes] = [{} for _ in formats]
    for name, shape in SHAPES.items():
        values = _values(generator, int(np.prod(shape)), formats, gentle)
        for codes, value, kind in zip(rows, values, formats, strict=True):
            codes[name] = encode(value, kind).reshape(shape)
    for row, (codes, kind) in enumerate(zip(rows, formats, strict=True)):
        save_codes(folder / (f"p{row}" if row else "base"), codes, kind, base=None if row == 0 else folder / "base")
    return Family(folder, tuple(formats), tuple(rows))


def _values(generator, count: int, formats: Sequence[Format], gentle: bool) -> list[np.ndarray]:
    """Return values of base and policies, each from a kind of trouble chosen at random."""
    lowest, highest = (-22, 11) if FLOAT16 in formats else (-140, 118)
    policies = len(formats) - 1

    def spread(low=lowest, high=highest):
        mantissa = generator.uniform(1, 2, count) * generator.choice([-1, 1], count)
        return np.ldexp(mantissa, generator.integers(low, high, count).astype(np.int32))

    def normal(size):
        return generator.normal(0, size, count)

    usual = normal(0.05)
    wide, grid = spread(), generator.integers(-4, 5, count) / 8
    zero = np.copysign(0.0, normal(1))
    kinds = [
        # As training leaves them.
        (usual, [usual + normal(0.01) for _ in range(policies)]),
        # Exponents that have nothing to do with one another.
        (wide, [spread() for _ in range(policies)]),
        # The residual all but takes the base away.
        (wide, [wide * np.ldexp(normal(1), generator.integers(-30, 0, count).astype(np.int32)) for _ in formats[1:]]),
        # Below the smallest normal number.
        (spread(lowest, lowest + 8), [spread(lowest, lowest + 8) for _ in range(policies)]),
        # Near the largest.
        (spread(highest, highest + 1), [spread(highest - 3, highest + 1) for _ in range(policies)]),
        # Zeros of both signs.
        (zero, [np.where(generator.random(count) < 0.5, normal(0.01), -zero) for _ in range(policies)]),
        (usual, [np.where(generator.random(count) < 0.5, usual, zero) for _ in range(policies)]),
        # Few bits: sums that vanish, magnitudes that are equal, results halfway between two numbers.
        (grid, [generator.integers(-4, 5, count) / 8 for _ in range(policies)]),
        (grid, [grid + generator.integers(-3, 4, count) / 1024 for _ in range(policies)]),
        # Nothing learnt, and all having learnt the same.
        (usual, [usual] * policies),
        (usual, [usual * 1.01] * policies),
    ]
    chosen = np.zeros(count, int) if gentle else generator.integers(0, len(kinds), count)
    columns = np.stack([np.stack([base, *others]) for base, others in kinds])
    return list(columns[chosen, :, np.arange(count)].T)


def as_torch(codes: np.ndarray, kind: Format) -> torch.Tensor:
    signed = np.ascontiguousarray(codes).view(np.int16 if kind.bits == 16 else np.int32)
    return torch.from_numpy(signed).view(getattr(torch, kind.name))


def save_codes(folder: Path, codes: Codes, kind: Format, base: Path | None = None, shards: int = 1) -> Path:
    """Save bit patterns as a checkpoint, in one file or several; `base` is what it was trained from."""
    return save_tensors(
        folder, {name: as_torch(value, kind) for name, value in codes.items()}, base=base, shards=shards
    )


def save_tensors(folder: Path, tensors, config=CONFIG, base: Path | None = None, shards: int = 1) -> Path:
    """Save tensors and a config as a checkpoint; several shards take the tensors in turn."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    if base:
        from rewarded_lines.checkpoints.hashing import weights_hash

        # Values like these look like those of another model; the record says that they are not.
        (folder / "training.json").write_text(json.dumps({"base_hash": weights_hash(base)}))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names = list(tensors)
    files = {f"model-{i + 1:05d}-of-{shards:05d}.safetensors": names[i::shards] for i in range(shards)}
    for file, held in files.items():
        save_file({name: tensors[name] for name in held}, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, held in files.items() for name in held}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def load_codes(folder: Path) -> tuple[Codes, dict[str, str]]:
    """Return the bit patterns of a checkpoint in one or several files, and the name of every tensor's type."""
    codes, kinds = {}, {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():
                tensor = opened.get_tensor(name)
                kinds[name] = str(tensor.dtype).removeprefix("torch.")
                width = {2: torch.uint16, 4: torch.uint32, 8: torch.uint64}[tensor.dtype.itemsize]
                codes[name] = tensor.view(width).numpy()
    return codes, kinds


def widest(formats: Sequence[Format]) -> Format:
    return formats[0] if len(set(formats)) == 1 else FLOAT32

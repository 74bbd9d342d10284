"""Tiny LoRA adapters, made and read by PEFT itself, and the change that each makes to every matrix, in float64."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import blake3
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

ATTENTION = ["q_proj", "v_proj"]
# What was saved before: the base's folder and the adapter's files, by all that decides them.
_SAVED: dict[Any, tuple[Path, dict[str, bytes]]] = {}


def save_adapter(
    base: Path, folder: Path, seed: int, kind=AutoModelForCausalLM, dtype: torch.dtype = torch.float32, **settings
) -> Path:
    """Train nothing: draw A, B, and what else PEFT would train, and save them as PEFT does.

    An adapter that was saved before is copied; only the path of its base differs.
    """
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ATTENTION, "task_type": "CAUSAL_LM", **settings}
    files = [path for path in sorted(Path(base).iterdir()) if path.suffix in (".json", ".safetensors")]
    content = blake3.blake3(b"".join(path.name.encode() + path.read_bytes() for path in files)).digest()
    key = content, seed, kind, dtype, repr(sorted(settings.items()))
    if key not in _SAVED:
        _save_anew(base, folder, seed, kind, dtype, settings)
        _SAVED[key] = base, {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        return folder
    first, saved = _SAVED[key]
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in saved.items():
        text = name.endswith((".json", ".md"))
        (folder / name).write_bytes(data.replace(str(first).encode(), str(base).encode()) if text else data)
    return folder


def _save_anew(base: Path, folder: Path, seed: int, kind: Any, dtype: torch.dtype, settings: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(kind.from_pretrained(base), LoraConfig(**settings), autocast_adapter_dtype=False)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.requires_grad:
                    start = weight if "lora_" not in name else 0
                    weight.copy_(start + 0.1 * torch.randn(weight.shape, generator=generator))
                    weight.data = weight.data.to(dtype)
        model.save_pretrained(folder)


def load_adapter(base: Path, folder: Path) -> PeftModel:
    """Return the base with an adapter on it."""
    with warnings.catch_warnings():
        # What PEFT warns of here (a tensor it misses, a pattern that matches nothing) would be a fault of ours.
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")
        warnings.filterwarnings("ignore", message=".*fan_in_fan_out.*")
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()


def changes(model: PeftModel) -> dict[str, torch.Tensor]:
    """Return what an adapter, as PEFT has loaded it, adds to each matrix it targets: scaling·B·A in float64."""
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            embedding = "default" in layer.lora_embedding_A
            a = layer.lora_embedding_A["default"] if embedding else layer.lora_A["default"].weight
            b = layer.lora_embedding_B["default"] if embedding else layer.lora_B["default"].weight
            product = layer.scaling["default"] * (b.detach().double() @ a.detach().double())
            found[name.removeprefix("base_model.model.")] = product.T if embedding else product
    return found


def settings_of(folder: Path) -> dict:
    """Return an adapter's settings."""
    return json.loads((folder / "adapter_config.json").read_text())


def factors(folder: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of an adapter's file."""
    return load_file(folder / "adapter_model.safetensors")


def edit_settings(folder: Path, **settings) -> Path:
    """Change an adapter's settings."""
    (folder / "adapter_config.json").write_text(json.dumps(settings_of(folder) | settings))
    return folder

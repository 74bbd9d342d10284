"""Folders in the form in which the Hub and trainers leave models and adapters, tiny, as docs/merge-what-you-have.md
names them."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny_models import make_tokenizer, perturb

BASE = "Qwen/Qwen3-0.6B"
CHAT = "{% for message in messages %}{{ message.content }}{% endfor %}"
LORA = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", "init_lora_weights": False}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
# What trainers leave beside the weights; nothing of it is read.
STATE = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


def save_everything(folder: Path) -> None:
    """Save a base as the Hub has it, and two policies of each form, named after what they were trained for."""
    save_base(folder / BASE)
    for seed, name in enumerate(("helpful", "brief"), start=1):
        whole = save_whole(folder, f"trl/{name}", seed)
        lora = save_lora(folder, f"trl/{name}-lora", seed, target_modules="all-linear")
        save_lora(folder, f"saves/qwen3/lora/{name}", seed, target_modules=ATTENTION)
        for other in (f"openrlhf/{name}", f"verl/{name}/global_step_100/actor/huggingface", f"saves/qwen3/full/{name}"):
            shutil.copytree(whole, folder / other)
        shutil.copytree(whole, whole / "checkpoint-500")
        for file in STATE:
            (whole / "checkpoint-500" / file).write_bytes(b"\x80")
        _openrlhf_lora(lora, folder / f"openrlhf/{name}-lora", folder / BASE)
        _verl_lora(lora, folder / f"verl/{name}-lora/global_step_100/actor/lora_adapter")
        _unsloth_lora(lora, folder / f"unsloth/{name}-lora")


def save_base(folder: Path) -> None:
    """Save the base: tied, with a copy of the embeddings as head and the old spelling of the type, as on the Hub."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        **{"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "head_dim": 32},
        **{"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128, "bos_token_id": 1},
        **{"eos_token_id": 2, "initializer_range": 0.2, "tie_word_embeddings": True},
    )
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).bfloat16().save_pretrained(folder)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with edited(folder / "config.json") as written:
        written["torch_dtype"] = written.pop("dtype")


def save_whole(folder: Path, name: str, seed: int) -> Path:
    """Save a policy and its tokenizer as `Trainer.save_model` does."""
    model, tokenizer = loaded(folder / BASE)
    perturb(model, seed).save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / name)
    (folder / name / "training_args.bin").write_bytes(b"\x80")
    return folder / name


def save_lora(folder: Path, name: str, seed: int, **settings: Any) -> Path:
    """Save an adapter and the tokenizer as `Trainer.save_model` does."""
    from peft import LoraConfig, get_peft_model

    model, tokenizer = loaded(folder / BASE)
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        get_peft_model(model, LoraConfig(**LORA, **settings)).save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / name)
    (folder / name / "training_args.bin").write_bytes(b"\x80")
    with edited(folder / name / "adapter_config.json") as written:
        # From the Hub, not a path of this machine.
        written["base_model_name_or_path"] = BASE
    return folder / name


def _openrlhf_lora(source: Path, target: Path, base: Path) -> None:
    """OpenRLHF writes the base's config beside the adapter."""
    shutil.copytree(source, target)
    shutil.copy(base / "config.json", target)


def _verl_lora(source: Path, target: Path) -> None:
    """Of an adapter verl writes the tensors and the settings: no model card, no tokenizer."""
    target.mkdir(parents=True)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        shutil.copy(source / name, target)


def _unsloth_lora(source: Path, target: Path) -> None:
    """Unsloth names its own quantized copy of the base, and targets modules by a pattern."""
    shutil.copytree(source, target)
    with edited(target / "adapter_config.json") as settings:
        settings["base_model_name_or_path"] = "unsloth/qwen3-0.6b-unsloth-bnb-4bit"
        settings["target_modules"] = (
            r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
            r"(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\."
            r"(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)\."
            r"(?:(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)))"
        )


def loaded(folder: Path) -> tuple[Any, Any]:
    """Return a model and its tokenizer as a trainer loads them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


@contextmanager
def edited(path: Path) -> Iterator[dict[str, Any]]:
    """Change a JSON file."""
    content = json.loads(path.read_text())
    yield content
    path.write_text(json.dumps(content, indent=2))

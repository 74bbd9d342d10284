"""Models for measuring on a card: Llamas with random weights, policies near them, and a project over them.

What they say means nothing; they are as large and as fast as trained ones. Nothing is downloaded.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

WORDS = "a the film about small town warm funny dull lifeless story of great beauty and little else jumps over".split()
_STEP = 1e-3


@dataclass(frozen=True)
class Size:
    """The numbers that shape a Llama."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int


THREE_B = Size(3072, 8192, 28, 24, 8, 32_000)
ONE_B = Size(2048, 8192, 16, 32, 8, 32_000)
TINY = Size(64, 128, 2, 2, 2, 320)


def make_tokenizer(vocabulary: int) -> Any:
    """Return a byte-level tokenizer with as many tokens; those without merges are only ever generated."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=min(vocabulary, 320), special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(sentences(200, 12), trainer)
    content = json.loads(tokenizer.to_str())
    known = content["model"]["vocab"]
    known |= {f"w{number}": number for number in range(len(known), vocabulary)}
    whole = Tokenizer.from_str(json.dumps(content))
    return PreTrainedTokenizerFast(tokenizer_object=whole, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def sentences(count: int, words: int) -> list[str]:
    """Return texts of so many words, always the same."""
    chance = random.Random(0)
    return [" ".join(chance.choices(WORDS, k=words)) for _ in range(count)]


def write_policies(folder: Path, size: Size, dtype: str, device: str, names: Sequence[str]) -> None:
    """Write a base, the first of the names, and policies near it, the others."""
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer = make_tokenizer(size.vocabulary)
    with torch.device(device):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config_of(size, tokenizer), dtype=getattr(torch, dtype))
    for seed, name in enumerate(names):
        if seed:
            generator = torch.Generator(device).manual_seed(seed)
            with torch.no_grad():
                for weight in model.parameters():
                    noise = torch.empty_like(weight).normal_(0, _STEP, generator=generator)
                    weight.add_(noise)
        model.save_pretrained(folder / name, max_shard_size="4GB")
        tokenizer.save_pretrained(folder / name)


def write_classifier(folder: Path, size: Size, dtype: str, device: str) -> None:
    """Write a reward model of one class."""
    import torch
    from transformers import AutoModelForSequenceClassification

    tokenizer = make_tokenizer(size.vocabulary)
    config = config_of(size, tokenizer)
    config.num_labels = 1
    with torch.device(device):
        torch.manual_seed(7)
        model = AutoModelForSequenceClassification.from_config(config, dtype=getattr(torch, dtype))
    model.save_pretrained(folder, max_shard_size="4GB")
    tokenizer.save_pretrained(folder)


def config_of(size: Size, tokenizer: Any) -> Any:
    """Return the config of a Llama."""
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=size.hidden,
        intermediate_size=size.inner,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        vocab_size=size.vocabulary,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def write_sweep_project(folder: Path, dtype: str, prompts: int, tokens: int) -> Path:
    """Write a project over `base`, `first`, `second` and `judge`: a function and a classifier, soups, 11 λ."""
    rows = [json.dumps({"prompt": text}) + "\n" for text in sentences(prompts, 32)]
    (folder / "test.jsonl").write_text("".join(rows))
    (folder / "rewards.py").write_text(
        "def words(prompts, responses):\n    return [len(text.split()) for text in responses]\n"
    )
    content = {
        "base": "base",
        "policies": {"first": "first", "second": "second"},
        "rewards": {"words": {"function": "rewards.py:words"}, "judge": {"model": "judge", "max_tokens": 512}},
        "prompts": {"file": "test.jsonl"},
        "generation": {"dtype": dtype, "max_tokens": tokens, "temperature": 1.0},
        "sweep": {"methods": ["soup"], "points": 11, "resamples": 100},
    }
    path = folder / "rewarded-lines.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def write_training_project(folder: Path, rows: int) -> Path:
    """Write what the recipes need beside `sft` and `rewards/positive`: data, and the project that names them."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for name, words in (("train", 16), ("validation", 17)):
        texts = [(text[: len(text) // 2], text[len(text) // 2 :]) for text in sentences(rows, words)]
        lines = [json.dumps({"prompt": prompt, "completion": rest}) + "\n" for prompt, rest in texts]
        (folder / "data" / f"{name}.jsonl").write_text("".join(lines))
    content = {
        "base": "sft",
        "rewards": {"positive": {"model": "rewards/positive"}},
        "generation": {"temperature": 1.0},
    }
    path = folder / "rewarded-lines.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path

"""Tiny models that tests make for themselves: a Llama of four blocks, its tokenizer, and small steps away from it."""

from __future__ import annotations

from pathlib import Path

import torch

TEXT = ["the quick brown fox jumps over the lazy dog", "a film of great beauty and of little else"]
PROMPTS = ["the quick", "a film", "of great beauty and", "dog", "jumps over the lazy dog"]


def make_tokenizer():
    """Return a byte-level BPE tokenizer of 300 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def make_model(seed: int, blocks: int = 4, hidden: int = 64):
    """Return a random tiny Llama; its weights are large enough for greedy decoding to have clear winners."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=300,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=blocks,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config)


def save_model(model, folder: Path, **options) -> Path:
    """Save model and tokenizer as a checkpoint folder."""
    model.save_pretrained(folder, **options)
    make_tokenizer().save_pretrained(folder)
    return folder


def perturb(model, seed: int, size: float = 0.05):
    """Move every weight a little, as training does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.add_((noise * size * weight.float().abs().mean()).to(weight.dtype))
    return model


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Return time of change and content of every file below a folder, to show that nothing was touched."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }

"""A tokenizer and a small Llama made from nothing, for tasks that bring no model of their own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

# Padding is a token of its own: PPO derives its masks from it, so it must not be the end of a text.
PAD, BOS, EOS = "<pad>", "<s>", "</s>"


@dataclass
class ScratchModel:
    """The model that is made when no `model` is named: a Llama of this shape over a byte-level BPE."""

    vocab_size: int = field(default=3000, metadata={"help": "entries of the vocabulary"})
    lowercase: bool = field(default=True, metadata={"help": "the tokenizer lower-cases its input"})
    num_hidden_layers: int = field(default=4, metadata={"help": "transformer blocks"})
    hidden_size: int = field(default=128, metadata={"help": "width of the residual stream"})
    intermediate_size: int = field(default=352, metadata={"help": "width of the MLP"})
    # vLLM's attention on CPU takes heads of 32 and more.
    num_attention_heads: int = field(default=4, metadata={"help": "attention heads"})
    max_position_embeddings: int = field(default=128, metadata={"help": "longest text, in tokens"})


def train_tokenizer(texts: Iterable[str], settings: ScratchModel) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer trained on `texts`; it opens every text with BOS."""
    tokenizer = Tokenizer(models.BPE())
    if settings.lowercase:
        tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocab_size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=settings.max_position_embeddings,
        clean_up_tokenization_spaces=False,
    )


def make_llama(tokenizer: PreTrainedTokenizerFast, settings: ScratchModel) -> LlamaForCausalLM:
    """Return an untrained Llama in float32 for `tokenizer`; PyTorch's global seed decides its weights."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.num_hidden_layers,
        num_attention_heads=settings.num_attention_heads,
        max_position_embeddings=settings.max_position_embeddings,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)

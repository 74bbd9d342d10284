"""A tokenizer, a small Llama from scratch and its trainer, for SFT without a base model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer
from trl import SFTTrainer

# Padding is a token of its own, never the end token: masks that TRL derives from it depend on that.
PAD, BOS, EOS = "<pad>", "<s>", "</s>"


@dataclass
class ScratchModel:
    """The model for SFT without `model_name_or_path`: a Llama over a byte-level BPE."""

    vocab_size: int = field(default=3000, metadata={"help": "entries of the vocabulary"})
    lowercase: bool = field(default=True, metadata={"help": "the tokenizer lower-cases its input"})
    num_hidden_layers: int = field(default=4, metadata={"help": "transformer blocks"})
    hidden_size: int = field(default=128, metadata={"help": "width of the residual stream"})
    intermediate_size: int = field(default=352, metadata={"help": "width of the MLP"})
    # vLLM's attention on a CPU needs heads of at least 32.
    num_attention_heads: int = field(default=4, metadata={"help": "attention heads"})
    max_position_embeddings: int = field(default=128, metadata={"help": "longest text, in tokens"})


def train_tokenizer(texts: Iterable[str], settings: ScratchModel) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer trained on `texts`, which begins every text with BOS."""
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
    """Return an untrained Llama in float32; PyTorch's global seed decides its weights."""
    shape = dict(vars(settings), vocab_size=len(tokenizer))
    del shape["lowercase"]
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    return LlamaForCausalLM(LlamaConfig(**shape, **special, tie_word_embeddings=True))


class WholeHeadTrainer(SFTTrainer):  # type: ignore[misc]
    """TRL's SFT trainer with the model's own loss, which computes all logits at once.

    TRL computes them in tiles, and again for the gradient. That saves memory where vocabularies are large; on a CPU, a
    step of a small model takes a quarter longer. The loss is the same; entropy and token accuracy are not logged.
    """

    args: Any

    def compute_loss(self, *inputs: Any, **options: Any) -> Any:
        """Return the loss of a batch; see `transformers.Trainer`."""
        kind = Trainer if self.args.loss_type == "nll" else SFTTrainer
        return kind.compute_loss(self, *inputs, **options)

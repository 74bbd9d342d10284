"""A tokenizer, a small Llama from scratch, its trainer and its optimizer, for SFT without a base model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
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


class MuonAdamW(torch.optim.Optimizer):
    """Muon and PyTorch's AdamW as one optimizer, since a Trainer takes only one.

    Muon (Jordan et al., 2024) orthogonalizes the update of a matrix. From scratch, a small Llama needs about
    half the tokens that it needs with AdamW; fine-tuning gains nothing.
    """

    def __init__(self, model: nn.Module, learning_rate: float, weight_decay: float) -> None:
        """Divide the parameters of a causal language model, whose blocks are in `model.layers`.

        Muon's updates are scaled to the size of AdamW's, so one learning rate serves both.
        """
        matrices: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                (matrices if ".layers." in name and parameter.dim() == 2 else others).append(parameter)
        muon = _Muon(matrices, lr=learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        adamw = torch.optim.AdamW(others, lr=learning_rate, weight_decay=weight_decay, betas=(0.9, 0.98), fused=True)
        self._parts = {"muon": muon, "adamw": adamw}
        super().__init__(muon.param_groups + adamw.param_groups, {})
        self._share_groups()

    def _share_groups(self) -> None:
        """Use the two optimizers' own groups, not copies: a scheduler sets the learning rate there."""
        self.param_groups = [group for part in self._parts.values() for group in part.param_groups]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step both optimizers."""
        with torch.enable_grad():
            loss = closure() if closure else None
        for part in self._parts.values():
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return both states."""
        return {name: part.state_dict() for name, part in self._parts.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore both states."""
        for name, part in self._parts.items():
            part.load_state_dict(state_dict[name])
        self._share_groups()


class _Muon(torch.optim.Muon):
    """PyTorch's Muon with Nesterov's momentum and AdamW's scale, in the parameters' own dtype.

    PyTorch's works in bfloat16, which takes 20 times as long on a CPU that does not support it.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Move every matrix: W ← (1 − ηw)W − 0.2η√max(m, n) · orthogonalized(g + µ(b − g)), b the gradient's mean."""
        for group in self.param_groups:
            rate, inertia = group["lr"], group["momentum"]
            for matrix in group["params"]:
                if (gradient := matrix.grad) is None:
                    continue
                state = self.state[matrix]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(matrix)
                mean = state["momentum_buffer"]
                mean.lerp_(gradient, 1 - inertia)
                update = _orthogonalized(gradient.lerp(mean, inertia), group)
                matrix.mul_(1 - rate * group["weight_decay"])
                matrix.add_(update, alpha=-0.2 * rate * math.sqrt(max(matrix.shape)))


def _orthogonalized(matrix: Tensor, group: dict[str, Any]) -> Tensor:
    """Bring the singular values of a matrix near 1 by Newton–Schulz: X ← aX + (bA + cA²)X with A = XXᵀ."""
    a, b, c = group["ns_coefficients"]
    tall = matrix.size(0) > matrix.size(1)
    result = matrix.T if tall else matrix
    result = result / result.norm().clamp(min=group["eps"])
    for _ in range(group["ns_steps"]):
        gram = result @ result.T
        result = torch.addmm(result, torch.addmm(gram, gram, gram, beta=b, alpha=c), result, beta=a)
    return result.T if tall else result

"""A seed and stop texts for each row of a batch, which transformers' generation does not have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rewarded_lines.config import GenerationSpec
from rewarded_lines.engines.base import Tokens
from rewarded_lines.engines.responses import ResponseReader

if TYPE_CHECKING:
    import torch


class SeededSampling:
    """Sampling with a seed for each row, as a logits processor for greedy search: the Gumbel-max trick.

    argmax(logits/T + g) is a draw from softmax(logits/T), where g is standard Gumbel noise. The noise comes from the
    row's own generator, so a row does not depend on the others. These come first, in vLLM's order: the repetition
    penalty (over prompt and response), the temperature, min_p, top_k and top_p.
    """

    def __init__(self, seeds: Sequence[int], spec: GenerationSpec, prompts: Sequence[Tokens]) -> None:
        """Make a generator for each row from its seed. `prompts`: without padding."""
        import torch
        from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._temperature, self._penalty = spec.temperature, spec.repetition_penalty
        self._lengths, self._padded = [len(prompt) for prompt in prompts], max(map(len, prompts))
        self._warpers: list[Any] = []
        if spec.temperature > 0:
            self._warpers += [MinPLogitsWarper(spec.min_p)] if spec.min_p > 0 else []
            self._warpers += [TopKLogitsWarper(spec.top_k)] if spec.top_k > 0 else []
            self._warpers += [TopPLogitsWarper(spec.top_p)] if spec.top_p < 1 else []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return perturbed scores [rows, vocabulary] whose argmax is a sample."""
        import torch

        scaled = self._penalized(input_ids, scores.float())
        if self._temperature == 0:
            return scaled
        scaled = scaled / self._temperature
        for warper in self._warpers:
            scaled = warper(input_ids, scaled)
        noise = torch.stack([torch.rand(scaled.shape[-1], generator=g) for g in self._generators])
        return scaled - torch.log(-torch.log(noise.clamp_min(1e-20))).to(scaled.device)

    def _penalized(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Make tokens of prompt and response less likely: a logit l > 0 becomes l/penalty, others l·penalty."""
        if self._penalty == 1:
            return scores
        scores = scores.clone()
        for row, length in enumerate(self._lengths):
            seen = input_ids[row, self._padded - length :].unique()
            held = scores[row, seen]
            scores[row, seen] = held.where(held < 0, held / self._penalty).where(held >= 0, held * self._penalty)
        return scores


class StopTexts:
    """A stopping criterion: each row ends with the token that completes its first stop text.

    Attributes:
        lengths: how many tokens each row had at its stop text; None for a row without one so far.
    """

    def __init__(self, reader: ResponseReader, prompts: Sequence[Tokens]) -> None:
        """Start with empty responses. `reader`: has the stop texts; `prompts`: without padding."""
        self.lengths: list[int | None] = [None] * len(prompts)
        self._reader, self._prompts = reader, prompts
        self._padded = max(map(len, prompts))

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """Return which rows [rows] have ended."""
        import torch

        for index, row in enumerate(input_ids[:, self._padded :].tolist()):
            # A stop text that begins in the prompt does not count.
            if self.lengths[index] is None and self._reader.text(self._prompts[index], row)[1]:
                self.lengths[index] = len(row)
        return torch.tensor([length is not None for length in self.lengths], device=input_ids.device)

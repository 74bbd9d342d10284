"""What transformers' generation lacks: a seed for every row of a batch, and texts at which a row ends by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rewarded_lines.config import GenerationSpec
from rewarded_lines.engines.tokens import Tokens, response_text

if TYPE_CHECKING:
    import torch


class SeededSampling:
    """Sampling with a seed for each row, as a logits processor for greedy search: the Gumbel-max trick.

    argmax(logits/T + g), g standard Gumbel noise from the row's own generator, is a draw from softmax(logits/T); a
    row's noise does not depend on which other rows are in the batch. top_p masks the tail first.
    """

    def __init__(self, seeds: Sequence[int], spec: GenerationSpec) -> None:
        """Make a generator for every row.

        Args:
            seeds: one for each row.
            spec: temperature > 0 and top_p.
        """
        import torch
        from transformers import TopPLogitsWarper

        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._temperature = spec.temperature
        self._top_p = TopPLogitsWarper(spec.top_p) if spec.top_p < 1 else None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return perturbed scores [rows, vocabulary] whose argmax is a sample."""
        import torch

        scaled = scores.float() / self._temperature
        if self._top_p is not None:
            scaled = self._top_p(input_ids, scaled)
        noise = torch.stack([torch.rand(scaled.shape[-1], generator=g) for g in self._generators])
        return scaled - torch.log(-torch.log(noise.clamp_min(1e-20))).to(scaled.device)


class StopTexts:
    """A stopping criterion: a row ends with the token that completes the first of some texts, whatever the others do.

    Attributes:
        lengths: of each row how many tokens it had then; None for one that has met no such text.
    """

    def __init__(self, tokenizer: Any, prompts: Sequence[Tokens], stop: Sequence[str]) -> None:
        """Begin with the responses empty.

        Args:
            tokenizer: that makes text of tokens.
            prompts: one for each row, without padding.
            stop: the texts.
        """
        self.lengths: list[int | None] = [None] * len(prompts)
        self._tokenizer, self._prompts, self._stop = tokenizer, prompts, stop
        self._padded = max(map(len, prompts))

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """Return which rows [rows] have ended."""
        import torch

        for index, row in enumerate(input_ids[:, self._padded :].tolist()):
            # A text that spans the end of the prompt is none of the response's.
            if self.lengths[index] is None and response_text(self._tokenizer, self._prompts[index], row, self._stop)[1]:
                self.lengths[index] = len(row)
        return torch.tensor([length is not None for length in self.lengths], device=input_ids.device)

"""The optimizer for models from scratch: Muon on the blocks' matrices, AdamW on everything else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class MuonAdamW(torch.optim.Optimizer):
    """PyTorch's Muon and AdamW as one optimizer, which is what a Trainer takes.

    Muon (Jordan et al., 2024) orthogonalizes the update of a matrix. A small Llama learns from scratch with
    about half the tokens that AdamW needs; fine-tuning an existing model has no use for it.
    """

    def __init__(self, model: nn.Module, learning_rate: float, weight_decay: float) -> None:
        """Share the parameters of `model` out.

        Args:
            model: a causal language model whose blocks are in `model.layers`.
            learning_rate: for both; Muon's updates are scaled to the size of AdamW's.
            weight_decay: for both.
        """
        named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        matrices = [p for name, p in named if ".layers." in name and p.dim() == 2]
        others = [p for name, p in named if ".layers." not in name or p.dim() != 2]
        muon = torch.optim.Muon(matrices, lr=learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        adamw = torch.optim.AdamW(others, lr=learning_rate, weight_decay=weight_decay, betas=(0.9, 0.98), fused=True)
        self._parts = (muon, adamw)
        super().__init__(muon.param_groups + adamw.param_groups, {})
        # The very groups of the two, not copies: a scheduler sets the learning rate there.
        self.param_groups = muon.param_groups + adamw.param_groups

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Let both take their step."""
        loss = closure() if closure else None
        for part in self._parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return both states."""
        return {"muon": self._parts[0].state_dict(), "adamw": self._parts[1].state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore both states, as a resumed run does."""
        for name, part in zip(("muon", "adamw"), self._parts, strict=True):
            part.load_state_dict(state_dict[name])
        self.param_groups = [group for part in self._parts for group in part.param_groups]

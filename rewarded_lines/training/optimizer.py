"""The optimizer for models from scratch: Muon on the blocks' matrices, AdamW on everything else."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class MuonAdamW(torch.optim.Optimizer):
    """Muon and PyTorch's AdamW as one optimizer, which is what a Trainer takes.

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
        muon = _Muon(matrices, lr=learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        adamw = torch.optim.AdamW(others, lr=learning_rate, weight_decay=weight_decay, betas=(0.9, 0.98), fused=True)
        self._parts = (muon, adamw)
        super().__init__(muon.param_groups + adamw.param_groups, {})
        # The very groups of the two, not copies: a scheduler sets the learning rate there.
        self.param_groups = muon.param_groups + adamw.param_groups

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Let both take their step."""
        with torch.enable_grad():
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


class _Muon(torch.optim.Muon):
    """PyTorch's Muon with Nesterov's momentum and the scale of AdamW, orthogonalizing in the parameters' own type.

    PyTorch's does it in bfloat16: faster where there are instructions for it, and twenty times as long as in float32
    on a CPU that has none.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move every matrix: W ← (1 − ηw)W − 0.2η√max(m, n) · orthogonalized(g + µ(b − g)), b the gradient's mean."""
        with torch.enable_grad():
            loss = closure() if closure else None
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
        return loss


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

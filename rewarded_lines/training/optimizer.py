"""The optimizer for models from scratch: Muon on the blocks' matrices, AdamW on everything else."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


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

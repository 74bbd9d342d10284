"""Merge rules: pure functions from a base tensor and policies' tensors to a merged one. No files, no state."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

# A method takes the residuals τ_i, all of one shape and dtype, and the weights λ_i, and returns one residual.
Method = Callable[[Sequence[torch.Tensor], Sequence[float]], torch.Tensor]

_WIDER = {torch.float16: torch.float32, torch.bfloat16: torch.float32}


def soup(residuals: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """Return Σ λ_i·τ_i, the residual of Rewarded Soups.

    Source: Rewarded Soups, arXiv 2306.04488, section 2.2.
    """
    total = residuals[0] * weights[0]
    for residual, weight in zip(residuals[1:], weights[1:], strict=True):
        total += residual * weight
    return total


METHODS: dict[str, Method] = {"soup": soup}


def merge_block(
    base: torch.Tensor,
    policies: Sequence[torch.Tensor],
    weights: Sequence[float],
    scale: float,
    method: Method,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return base + s·m(policy_1 − base, …; λ), computed one precision up and cast once, to nearest even.

    Args:
        base: the SFT model's values θ, any shape.
        policies: the policies' values, each of base's shape; only those whose weight is not 0.
        weights: λ_i, one for each of `policies`.
        scale: s, the tensor's LiNeS factor.
        method: m, a row of `METHODS`.
        dtype: of the result.
    """
    wide = compute_dtype([base.dtype, dtype, *(policy.dtype for policy in policies)])
    origin = base.to(wide)
    residuals = [policy.to(wide) - origin for policy in policies]
    return (origin + method(residuals, weights) * scale).to(dtype)


def compute_dtype(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    """Return the precision to compute in: float32 for 16-bit values, float64 for wider ones."""
    return max((_WIDER.get(dtype, torch.float64) for dtype in dtypes), key=lambda dtype: dtype.itemsize)


def copied_policy(weights: Sequence[float], scale: float) -> int | None:
    """Return the index of the policy that the merged tensor equals exactly, or None.

    That is so where s·λ_i = 1 and every other weight is 0: the tensor is then copied, bit for bit.
    """
    used = [index for index, weight in enumerate(weights) if weight * scale != 0]
    return used[0] if len(used) == 1 and weights[used[0]] * scale == 1 else None

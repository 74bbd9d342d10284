"""The arithmetic of `numpy_kernels` in torch, for any of its devices: the same bits.

Every operation is one of IEEE 754 on float64, and they run in the same order. Each is a call of its own, so that no
compiler joins a product and a sum into one rounding. Every NaN is stored as one pattern.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from rewarded_lines.kernels.tensor_merge import TensorMerge

_HALVES = (torch.bfloat16, torch.float16)


def rounded(wide: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return float64 values in another type, rounded once: to nearest, ties to even.

    torch's own cast to 16 bits rounds twice, to float32 and from there. Here the first rounding is to odd: a value
    between two float32 becomes the one whose last bit is 1. So the second rounding still sees on which side of a tie
    the value is. With ○ to nearest and □ to odd: ○_q(□_p(x)) = ○_q(x) if p ≥ q + 2 and if the p-bit format has
    smaller subnormal numbers, by a factor of 4 at least. Float32 has p = 24 and steps of 2⁻¹⁴⁹; bfloat16 has q = 8
    and 2⁻¹³³, float16 11 and 2⁻²⁴. Beyond float32's range □ gives its largest number, which both types round to
    infinity.

    Source: Boldo and Melquiond, Emulation of a FMA and correctly rounded sums: proved algorithms using rounding to odd,
    IEEE Transactions on Computers 57(4), 2008, doi 10.1109/TC.2007.70819.
    """
    if dtype not in _HALVES:
        return wide.to(dtype)
    near = wide.to(torch.float32)
    # As integers, magnitudes are in the order of their values: 1 less is the next number towards zero.
    inexact, beyond = near != wide, near.abs() > wide.abs()
    near.view(torch.int32).sub_(beyond.to(torch.int32)).bitwise_or_(inexact)
    return near.to(dtype)


def cast(values: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, int]:
    """Return values of any floating-point type in another one, rounded once, and how many of these are not finite."""
    return _counted(rounded(values.to(torch.float64), dtype))


def count_nonfinite(values: torch.Tensor) -> int:
    """Return how many values are NaN or infinite."""
    return values.numel() - int(torch.isfinite(values).sum())


def residual(policy: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """Return policy − base as float64, 0 where both are equal: the difference of equal infinities would be NaN.

    Args:
        policy: stored values.
        base: float64.
    """
    return torch.where(policy == base, 0.0, policy - base)


def merge_values(
    step: TensorMerge,
    base: torch.Tensor,
    policies: Sequence[torch.Tensor | None],
    alike: bool,
    moved: Callable[[int], torch.Tensor] | None = None,
    kept: Sequence[torch.Tensor] = (),
) -> tuple[torch.Tensor, int]:
    """Return one output's values, and how many of them are not finite.

    Args:
        step: how they are made; not by copying.
        base: n stored values.
        policies: likewise, of each policy; None for an adapter.
        alike: whether all inputs store the tensor, in one type: then the linear kernel's order of operations holds.
        moved: returns the float64 residual of an adapter, by its place in `policies`.
        kept: the masks of a rule that has some.
    """
    origin, dtype = base.to(torch.float64), getattr(torch, step.dtype.torch)

    def finish(residuals: list[torch.Tensor]) -> tuple[torch.Tensor, int]:
        return _counted(rounded(_merged(step, origin, residuals, alike, kept), dtype))

    if step.linear and alike:
        # Without the test for equal values, which only infinite ones need.
        made = finish([_whole(policies[row]) - origin for row in step.rows])
        if not made[1]:
            return made
    residuals = []
    for row in step.rows:
        policy = policies[row]
        assert policy is not None or moved is not None, "an adapter stores no tensors"
        residuals.append(residual(policy, origin) if policy is not None else moved(row))  # type: ignore[misc]
    return finish(residuals)


def _counted(made: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Give every NaN the pattern of torch's own, quiet and positive; return also how many values are not finite."""
    bad = count_nonfinite(made)
    return (made.masked_fill(made.isnan(), torch.nan) if bad else made), bad


def _whole(policy: torch.Tensor | None) -> torch.Tensor:
    assert policy is not None, "all inputs store the tensor"
    return policy


def _merged(
    step: TensorMerge,
    origin: torch.Tensor,
    residuals: list[torch.Tensor],
    alike: bool,
    kept: Sequence[torch.Tensor],
) -> torch.Tensor:
    assert step.rule is not None, "a copied tensor has no residual"
    drawn = {"kept": kept} if step.masks else {}
    if step.linear and alike:
        # As `linear` does it: the scale goes into the weights.
        total: torch.Tensor = origin + step.rule(residuals, [weight * step.scale for weight in step.weights])
        return total
    options = {name: _parameter(value, origin) for name, value in step.parameters.items()}
    merged: torch.Tensor = origin + step.rule(residuals, step.weights, **options, **drawn) * step.scale
    return merged


def _parameter(value: Any, like: torch.Tensor) -> Any:
    """Return a number as a tensor on the device: on a GPU torch would multiply by the inverse of a plain divisor."""
    return torch.full((), value, dtype=torch.float64, device=like.device) if isinstance(value, float) else value

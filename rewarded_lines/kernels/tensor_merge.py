"""How an output's tensor is made of the inputs': plain data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import numpy as np

from rewarded_lines.checkpoints.dtypes import DType

# Outputs that are merged at a time: with a block of each in memory, it would grow with the number of λ.
AT_ONCE = 64

Rule = Callable[..., Any]
Run = Callable[[int, int, int], tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]
"""From a policy and the ends of a run of its tensor: two arrays whose difference is τ."""


class Mask(Protocol):
    """The mask of a policy's tensor, boolean or float64 factors; equal ones, by hash, are drawn once."""

    dtype: ClassVar[np.dtype[Any]]

    @property
    def words(self) -> tuple[int, int, int]:
        """Return the key of its random numbers, and how many bits number a block's values; see `Philox`."""

    @property
    def ranked(self) -> tuple[int, int] | None:
        """Return of which policy it needs the ranks of magnitudes, in rows of how many values; None if of none."""

    def chosen(self, numbers: Any, ranks: Any) -> Any:
        """Return the mask by random numbers below 2²⁴ and ranks, float64 arrays or symbols."""

    def ranks(self, run: Run, start: int, out: np.ndarray[Any, Any]) -> None:
        """Fill the uint32 array `out` with the ranks of a block, from the tensor's `start`-th value on."""

    def __call__(self, run: Run, start: int, out: np.ndarray[Any, Any]) -> None:
        """Fill `out` with the mask of a block, from the tensor's `start`-th value on."""


@dataclass(frozen=True)
class TensorMerge:
    """How one output's tensor is made: plain data, decided before the stream starts.

    Attributes:
        dtype: the output's type.
        copy: the input to copy: 0 the base, i policy i−1; None if the tensor is computed.
        rows: the policies that take part, in the order of summation.
        weights: λ_i of each.
        scale: s, the schedule's factor.
        rule: the method's rule.
        linear: the rule is Σ λ_i·τ_i, which has a kernel of its own.
        parameters: options of the rule.
        masks: draw the random masks of a rule that needs them, one for each of `rows`.
    """

    dtype: DType
    copy: int | None
    rows: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()
    scale: float = 1.0
    rule: Rule | None = None
    linear: bool = False
    parameters: Mapping[str, Any] = field(default_factory=dict)
    masks: Sequence[Mask] = ()

    def residual(self, residuals: Sequence[Any], kept: Sequence[Any], weights: Sequence[Any] | None = None) -> Any:
        """Return what the rule makes of residuals, masks and weights: arrays of numpy or torch, or symbols for them."""
        assert self.rule is not None, "a copied tensor has no residual"
        drawn = {"kept": kept} if self.masks else {}
        return self.rule(residuals, self.weights if weights is None else weights, **self.parameters, **drawn)

    def kept(self, masks: Iterable[Any]) -> list[Any]:
        """Return the mask of each of `rows`, from those of `all_masks([self])`: equal policies share one."""
        drawn = dict(zip(all_masks([self]), masks, strict=True))
        return [drawn[mask] for mask in self.masks]


def all_masks(steps: Sequence[TensorMerge]) -> list[Mask]:
    """Return the masks of some outputs, each once."""
    return list(dict.fromkeys(mask for step in steps for mask in step.masks))

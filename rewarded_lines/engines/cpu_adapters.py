"""LoRA layers of vLLM on a CPU: tokens grouped by adapter, instead of a copy of an adapter's factors for each token.

vLLM gathers A and B once per token there, which costs more than the model itself as soon as many requests share a
batch. Products are the same; only the order in which rows are worked on is another.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def group_adapters() -> None:
    """Have vLLM's CPU layers of this process use the functions below."""
    from vllm.lora.punica_wrapper import punica_cpu

    for name, function in FUNCTIONS.items():
        assert hasattr(punica_cpu, name), f"this vLLM has no {name}"
        setattr(punica_cpu, name, function)


def shrink(
    inputs: torch.Tensor, factors: torch.Tensor, output: torch.Tensor, slots: torch.Tensor, scaling: float = 1.0
) -> None:
    """Write scaling · A_s x for every token's slot s.

    Args:
        inputs: x [tokens, in].
        factors: A [slots, 1, r, in].
        output: [tokens, r or more].
        slots: s of each token; -1 is the last one, as in vLLM.
        scaling: a factor.
    """
    factors = factors.flatten(0, 1)
    inputs = inputs.to(output.dtype)
    rank = factors.shape[1]
    for rows, slot in _groups(slots[: len(inputs)]):
        output[rows, :rank] = (inputs[rows] @ factors[slot].T.to(output.dtype)).mul_(scaling)


def expand_slice(
    inputs: torch.Tensor,
    factors: torch.Tensor,
    output: torch.Tensor,
    slots: torch.Tensor,
    offset: int,
    size: int,
    add_inputs: bool = True,
) -> None:
    """Write B_s x, or add it, for every token's slot s, into some columns of the output.

    Args:
        inputs: x [tokens, r].
        factors: B [slots, 1, out, r].
        output: [tokens, columns].
        slots: s of each token; -1 is the last one, as in vLLM.
        offset: of the first column.
        size: how many columns.
        add_inputs: whether to add to what is there.
    """
    factors = factors.flatten(0, 1)
    # An adapter and its layer may be padded to different widths.
    size = min(size, factors.shape[1], output.shape[1] - offset)
    inputs = inputs.to(output.dtype)
    for rows, slot in _groups(slots[: len(output)]):
        product = inputs[rows] @ factors[slot, :size].T.to(output.dtype)
        if add_inputs:
            output[rows, offset : offset + size] += product
        else:
            output[rows, offset : offset + size] = product


def expand(
    inputs: torch.Tensor,
    factors: torch.Tensor,
    output: torch.Tensor,
    slots: torch.Tensor,
    add_inputs: bool = True,
) -> None:
    """Do what `expand_slice` does, for all columns."""
    expand_slice(inputs, factors, output, slots, 0, output.shape[1], add_inputs)


def _groups(slots: torch.Tensor) -> Iterator[tuple[Any, int]]:
    """Yield the rows of each slot: a slice where they are next to each other."""
    import torch

    found, counts = torch.unique_consecutive(slots, return_counts=True)
    if len(found) > len(torch.unique(found)):
        for slot in torch.unique(found).tolist():
            yield torch.nonzero(slots == slot)[:, 0], slot
        return
    start = 0
    for slot, count in zip(found.tolist(), counts.tolist(), strict=True):
        yield slice(start, start + count), slot
        start += count


def _by_sequence(function: Any) -> Any:
    """Return a function that takes vLLM's description of sequences where the other takes a slot for each token."""

    def of_sequences(
        inputs: Any, factors: Any, output: Any, starts: Any, lengths: Any, slots: Any, *rest: Any, **named: Any
    ) -> None:
        # `rest` begins with the number of sequences, their longest and the number of tokens.
        function(inputs, factors, output, slots.repeat_interleave(lengths), *rest[3:], **named)

    return of_sequences


# What stands for what in vLLM's module.
FUNCTIONS = {
    "bgmv_shrink": shrink,
    "bgmv_expand": expand,
    "bgmv_expand_slice": expand_slice,
    "sgmv_shrink": _by_sequence(shrink),
    "sgmv_expand": _by_sequence(expand),
    "sgmv_expand_slice": _by_sequence(expand_slice),
}

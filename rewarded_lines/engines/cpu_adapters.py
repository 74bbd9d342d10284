"""LoRA layers of vLLM on a CPU: tokens are grouped by adapter.

vLLM itself copies A and B for every token. This costs more than the model as soon as many requests share a batch. The
products are the same; only the order of the rows differs. Tokens without an adapter stay as they are; vLLM before 0.33
gives them the adapter of the last slot.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing import TypeAlias

    import torch

    _Slots: TypeAlias = "torch.Tensor | _Runs"


def group_adapters() -> None:
    """Replace the functions of vLLM's CPU layers in this process by those below."""
    from vllm.lora.punica_wrapper import punica_cpu

    for name, function in FUNCTIONS.items():
        assert hasattr(punica_cpu, name), f"this vLLM has no {name}"
        setattr(punica_cpu, name, function)


def shrink(
    inputs: torch.Tensor, factors: torch.Tensor, output: torch.Tensor, slots: _Slots, scaling: float = 1.0
) -> None:
    """Write scaling · A_s x for every token's slot s.

    Args:
        inputs: x [tokens, in].
        factors: A [slots, 1, r, in].
        output: [tokens, r or more].
        slots: s of each token; -1 for none.
        scaling: a factor.
    """
    factors = factors.flatten(0, 1).to(output.dtype)
    inputs = inputs.to(output.dtype)
    part = output[:, : factors.shape[1]]
    for group in _groups(slots, len(inputs)):
        product = group.product(inputs, factors)
        group.put(part, product if scaling == 1 else product.mul_(scaling))


def expand_slice(
    inputs: torch.Tensor,
    factors: torch.Tensor,
    output: torch.Tensor,
    slots: _Slots,
    offset: int,
    size: int,
    add_inputs: bool = True,
) -> None:
    """Write or add B_s x for every token's slot s into some columns of the output.

    Args:
        inputs: x [tokens, r].
        factors: B [slots, 1, out, r].
        output: [tokens, columns].
        slots: s of each token; -1 for none.
        offset: of the first column.
        size: how many columns.
        add_inputs: whether to add to what is there.
    """
    factors = factors.flatten(0, 1).to(output.dtype)
    # An adapter and its layer may be padded to different widths.
    size = min(size, factors.shape[1], output.shape[1] - offset)
    factors, part = factors[:, :size], output[:, offset : offset + size]
    inputs = inputs.to(output.dtype)
    for group in _groups(slots, len(output)):
        group.put(part, group.product(inputs, factors), add_inputs)


def expand(
    inputs: torch.Tensor,
    factors: torch.Tensor,
    output: torch.Tensor,
    slots: _Slots,
    add_inputs: bool = True,
) -> None:
    """Do what `expand_slice` does, for all columns."""
    expand_slice(inputs, factors, output, slots, 0, output.shape[1], add_inputs)


# Up to so many rows in all, one product of many copies is faster than a product for each adapter.
_FEW_ROWS = 256


@dataclass
class _Group:
    """Tokens that are multiplied together: as many of each of some adapters.

    Attributes:
        slots: of the adapters, [adapters]; a slice where they are all next to each other, which needs no copy.
        rows: of their tokens, [adapters, tokens of each]; a slice where they are all next to each other.
        shape: of the rows.
    """

    slots: Any
    rows: Any
    shape: tuple[int, int]

    def product(self, inputs: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
        """Return the tokens [tokens, in] times their adapters' factors [slots, out, in]: [adapters, of each, out]."""
        import torch

        return torch.bmm(inputs[self.rows].view(*self.shape, -1), factors[self.slots].transpose(1, 2))

    def put(self, output: torch.Tensor, values: torch.Tensor, add: bool = False) -> None:
        """Write values to the tokens' rows of the output, or add them."""
        rows = self.rows if isinstance(self.rows, slice) else self.rows.flatten()
        values = values.flatten(0, 1)
        output[rows] = output[rows] + values if add else values


@dataclass
class _Runs:
    """Slots of tokens that stand in runs, as vLLM describes sequences: the slot of each run, and its length."""

    slots: torch.Tensor
    lengths: torch.Tensor

    def each(self) -> torch.Tensor:
        """Return the slot of each token."""
        return self.slots.repeat_interleave(self.lengths)


_last: tuple[list[torch.Tensor], int, list[_Group]] | None = None


def _groups(slots: _Slots, tokens: int) -> list[_Group]:
    """Return the tokens of each slot; all layers of a step ask for the same, so the last answer is kept."""
    global _last
    import torch

    key = [slots.slots, slots.lengths] if isinstance(slots, _Runs) else [slots]
    same = _last is not None and _last[1] == tokens and len(_last[0]) == len(key)
    if _last is None or not same or not all(map(torch.equal, _last[0], key)):
        each = slots.each() if isinstance(slots, _Runs) else slots
        _last = [one.clone() for one in key], tokens, _group(each[:tokens])
    return _last[2]


def _group(slots: torch.Tensor) -> list[_Group]:
    """Return one group if tokens are few or slots have about as many each, else one for each slot; none for slot -1."""
    import torch

    order = slots.argsort(stable=True)[int((slots < 0).sum()) :]
    if not len(order):
        return []
    found, counts = slots[order].unique_consecutive(return_counts=True)
    most = int(counts.max())
    if len(found) * most <= max(2 * len(order), _FEW_ROWS):
        # A slot with fewer tokens than the others repeats its last one.
        places = torch.arange(most).expand(len(found), most).minimum(counts[:, None] - 1)
        rows = order[places + (counts.cumsum(0) - counts)[:, None]]
        return [_Group(_as_slice(found), _as_slice(rows), (len(found), most))]
    tokens = order.split(counts.tolist())
    return [
        _Group(_as_slice(slot), _as_slice(rows), (1, len(rows)))
        for slot, rows in zip(found.split(1), tokens, strict=True)
    ]


def _as_slice(rows: torch.Tensor) -> torch.Tensor | slice:
    """Return numbers that stand next to each other as a slice, which needs no copy."""
    import torch

    first, count = int(rows.flatten()[0]), rows.numel()
    return slice(first, first + count) if torch.equal(rows.flatten(), torch.arange(first, first + count)) else rows


def _by_sequence(function: Any) -> Any:
    """Return a function that takes vLLM's description of sequences where the other takes a slot for each token."""

    def of_sequences(
        inputs: Any, factors: Any, output: Any, starts: Any, lengths: Any, slots: Any, *rest: Any, **named: Any
    ) -> None:
        # `rest` begins with the number of sequences, their longest and the number of tokens.
        function(inputs, factors, output, _Runs(slots, lengths), *rest[3:], **named)

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

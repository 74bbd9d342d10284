"""How PPO's prompts and responses are laid out: their order, positions, padding and mini-batches."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler
from trl.trainer import utils as trl_utils

Batch = dict[str, Tensor]


class EpochSampler(Sampler[int]):
    """TRL's order of prompts, with a seed of its own in every epoch: a resumed run begins in any of them."""

    def __init__(self, order: Any, trainer: Any) -> None:
        """Take TRL's sampler, and the trainer that knows the epoch."""
        self._order, self._trainer = order, trainer

    def __iter__(self) -> Iterator[int]:
        """Return the numbers of the rows of this epoch."""
        if self._order.shuffle:
            self._order.generator.manual_seed(self._order.seed + int(self._trainer.state.epoch or 0))
        return iter(self._order)

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._order)


def token_places(attention_mask: Tensor) -> Tensor:
    """Return the position of each token in its text; padding on the left does not count."""
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


def place_tokens(model: Any) -> None:
    """Make a causal language model count positions from a text's first token: TRL's batches are padded on the left."""
    body = model.base_model
    if "position_ids" not in inspect.signature(type(body).forward).parameters:
        return

    def place(module: Any, given: Any, named: dict[str, Any]) -> Any:
        # Generation passes positions itself.
        if named.get("position_ids") is None and named.get("use_cache") is False:
            named = {**named, "position_ids": token_places(named["attention_mask"])}
        return given, named

    body.register_forward_pre_hook(place, with_kwargs=True)


def skip_padding_on_cpu() -> None:
    """Let TRL's language model head leave out padding and prompts on a CPU, as it does on a GPU.

    On the demo's models, half of an update was the head's work on tokens that no loss reads.
    """
    own = getattr(trl_utils, "_use_triton", None)
    if own is not None and not hasattr(own, "also_cpu"):

        def use(device: torch.device) -> bool:
            return device.type == "cpu" or bool(own(device))

        use.also_cpu = True  # type: ignore[attr-defined]
        trl_utils._use_triton = use


def mini_batches(parts: list[Batch], size: int) -> list[list[Batch]]:
    """Return mini-batches of `size` parts, each part with responses of similar length and no needless padding.

    The loss of a mini-batch is a mean over its tokens, so it does not matter which part a response is in.
    """
    made = []
    for start in range(0, len(parts), size):
        names = [name for name, value in parts[start].items() if value.dim()]
        joined = {name: torch.cat([part[name] for part in parts[start : start + size]]) for name in names}
        order = joined["completion_mask"].sum(1).argsort(stable=True)
        made.append([_trimmed({name: value[rows] for name, value in joined.items()}) for rows in order.chunk(size)])
    return made


def _trimmed(batch: Batch) -> Batch:
    """Return a batch without the columns that are padding in every row."""
    width = batch["completion_mask"].shape[1]
    longest = max(1, int(batch["completion_mask"].sum(1).max()))
    skipped = int(batch["prompt_mask"].any(0).int().argmax())
    trimmed = {name: value[:, :longest] if value.shape[1:2] == (width,) else value for name, value in batch.items()}
    return trimmed | {name: batch[name][:, skipped:] for name in ("prompt_ids", "prompt_mask")}

"""PPO's mini-batches and their padding."""

from __future__ import annotations

import torch
from torch import Tensor
from trl.trainer import utils as trl_utils

Batch = dict[str, Tensor]


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

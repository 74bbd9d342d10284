"""The LiNeS schedule: the scale of the residual by depth. Pure numbers."""

from __future__ import annotations

import math
from typing import Literal

from rewarded_lines.checkpoints.tensor_depth import Place
from rewarded_lines.errors import Problem, UserError, fail

Outside = Literal["alpha", "depth"]


def check_schedule(alpha: float, beta: float) -> None:
    """Refuse a schedule whose α or β is not a finite number."""
    problems = [
        Problem("not a finite number", where=option, got=str(value))
        for option, value in (("--alpha", alpha), ("--beta", beta))
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value)
    ]
    if problems:
        raise UserError(problems)


def lines_scale(block: int | None, blocks: int, alpha: float, beta: float) -> float:
    """Return the LiNeS scale of one tensor by its block.

    λ^(ℓ) = α + β·(ℓ−1)/(L−1) for ℓ = 1 … L, the block counted from 1; tensors outside the blocks (embeddings, final
    norm, head) get α, as in the authors' code, and so does every tensor of a model with a single block.

    Args:
        block: the 0-based block index ℓ−1, or None outside the blocks.
        blocks: the number of blocks L ≥ 1.
        alpha: scale of the first block.
        beta: added by the last block.

    Source: LiNeS, arXiv 2410.17146, equation 3 and section 4.
    """
    if block is None or blocks == 1:
        return alpha
    # Divide first: the quotient is exactly 1 in the last block, so β = 1 − α gives scale 1 there.
    return alpha + beta * (block / (blocks - 1))


def tensor_scale(place: Place, alpha: float, beta: float, outside: Outside = "alpha", name: str = "") -> float:
    """Return the LiNeS scale of one tensor by its place in the model.

    Inside the blocks this is `lines_scale`, L the length of the tensor's own block list: an encoder and a decoder each
    run from α to α + β. The paper does not define it outside the blocks. There "alpha" gives α, as in the authors'
    code. "depth" gives the scale of the nearest block: α for embeddings, α + β for final norm and head (α if L = 1).
    Towers are as the user says: kept as the base has them, so scaled by 0, or flat, so scaled by α.

    Args:
        place: of the tensor.
        alpha: scale of the first block.
        beta: added by the last block.
        outside: the rule for tensors outside the blocks.
        name: of the tensor, for the message.

    Raises:
        UserError: the rule is "depth", and the tensor may be before or after the blocks.
    """
    if place.block is not None:
        return lines_scale(place.block, place.blocks, alpha, beta)
    if place.side == "base":
        return 0.0
    if outside == "alpha" or place.side in ("before", "flat"):
        return alpha
    if place.side == "after":
        return lines_scale(place.blocks - 1, place.blocks, alpha, beta)
    raise fail(
        "unknown whether this tensor is before or after the blocks",
        where=name or place.stack,
        expected="embeddings, a final norm or a head with a known name",
        remedy="pass --outside alpha: all tensors outside the blocks get α",
    )

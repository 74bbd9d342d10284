"""The LiNeS schedule: how much of a residual each depth keeps. Pure numbers."""

from __future__ import annotations


def lines_scale(block: int | None, blocks: int, alpha: float, beta: float) -> float:
    """Return the factor that LiNeS gives the residual of one tensor.

    λ^(ℓ) = α + β·(ℓ−1)/(L−1) for ℓ = 1 … L, the block counted from 1; tensors outside the blocks (embeddings, final
    norm, head) get α, as in the authors' code, and so does every tensor of a model with a single block.

    Args:
        block: the 0-based block index ℓ−1, or None outside the blocks.
        blocks: the number of blocks L ≥ 1.
        alpha: scale of the first block.
        beta: what the last block gets on top of α.

    Source: LiNeS, arXiv 2410.17146, equation 3 and section 4.
    """
    if block is None or blocks == 1:
        return alpha
    return alpha + beta * block / (blocks - 1)

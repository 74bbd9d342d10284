"""Random masks that depend on the seed and on what is masked, not on order, blocks or threads."""

from __future__ import annotations

from typing import Any

import blake3
import numpy as np

from rewarded_lines.streaming.blocks import BLOCK, pieces


def random_mask(seed: int, name: str, digest: bytes, density: float, start: int, count: int) -> Any:
    """Return `count` booleans, each true with probability `density`, for a tensor's values from `start` on.

    The counter-based generator Philox is keyed with the seed, the tensor's name and its content: a policy keeps its
    mask wherever it stands among the others and however its files are cut.

    Args:
        seed: the user's.
        name: of the tensor.
        digest: of the policy's values of that tensor.
        density: probability of true.
        start: a multiple of the block length.
        count: at most the block length.
    """
    assert start % BLOCK == 0 and count <= BLOCK
    key = blake3.blake3(f"{seed}:{name}:".encode() + digest).digest()
    words = np.frombuffer(key[:16], dtype="<u8")
    generator = np.random.Generator(np.random.Philox(key=words, counter=[0, 0, start // BLOCK, 0]))
    mask = np.empty(count, np.bool_)
    for piece in pieces(mask):
        np.less(generator.random(piece.size, np.float32), np.float32(density), out=piece)
    return mask

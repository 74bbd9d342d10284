"""Residuals as whole matrices in float64: their singular values, and their best approximations of low rank."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from rewarded_lines.checkpoints.headers import TensorInfo
from rewarded_lines.kernels.blocks import Array, Workspace
from rewarded_lines.kernels.distances import visit_blocks


def whole_tensor(
    begin: Callable[[], Workspace], info: TensorInfo, rows: int, take: Callable[[Workspace], Array]
) -> Array:
    """Return `rows` float64 tensors of the shape of `info`, stacked: `take` returns each block's values, [rows, n]."""
    out = np.empty((rows, info.elements))

    def place(workspace: Workspace, _: str, start: int, count: int) -> None:
        out[:, start : start + count] = take(workspace)

    visit_blocks(begin, [info], place)
    return out.reshape(rows, *info.shape)


def cost(shape: tuple[int, ...]) -> float:
    """Return about how many operations the singular values of a matrix take; 10¹⁰ take a second on one core."""
    short, long = sorted(shape)
    return float(short * short * (long + 8 * short))


def energies(matrix: Array) -> Array:
    """Return the squares of the singular values, the largest first.

    They are the eigenvalues of R·Rᵀ, of the smaller of the two sides. Each is right to about 10⁻¹⁵ of their sum.
    """
    short = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    found: Array = np.clip(np.linalg.eigvalsh(short @ short.T)[::-1], 0, None)
    return found


def best_factors(matrix: Array, rank: int) -> tuple[Array, Array]:
    """Return B, [out, rank], and A, [rank, in], whose product is the nearest matrix of that rank: U√Σ and √Σ·Vᵀ.

    With rows ≤ columns, U has the first eigenvectors of R·Rᵀ, and √Σ·Vᵀ comes from Uᵀ·R, so that U·Uᵀ·R is R itself at
    full rank, to rounding. The largest entry of each column of U is positive. Both factors are equally large, so that
    neither leaves the range of 16-bit types.

    Source: Eckart and Young, Psychometrika 1936.
    """
    wide = matrix.shape[0] <= matrix.shape[1]
    short = matrix if wide else matrix.T
    vectors = np.linalg.eigh(short @ short.T)[1][:, ::-1][:, :rank]
    peaks = vectors[np.abs(vectors).argmax(axis=0), np.arange(vectors.shape[1])]
    vectors = vectors * np.where(peaks < 0, -1.0, 1.0)
    projected = vectors.T @ short
    roots = np.sqrt(np.linalg.norm(projected, axis=1))
    left, right = vectors * roots, projected / np.where(roots == 0, 1.0, roots)[:, None]
    return (left, right) if wide else (right.T, left.T)

"""What an adapter changes: matrices of low rank, and rows of embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rewarded_lines.checkpoints.adapter_config import ADAPTER_CONFIG
from rewarded_lines.checkpoints.headers import TensorInfo

NO_MATRICES = "only matrices are merged, no convolutions"
EMPTY = "there are no values"


@dataclass(frozen=True)
class LowRank:
    """The residual of an adapter for one matrix: scaling·B·A, for embeddings scaling·(B·A)ᵀ.

    For the fused experts of a mixture it is one matrix for each expert: expert e of E has the rows e·r to (e+1)·r of A
    and the columns e, E+e, 2·E+e … of B.

    Attributes:
        module: the name in the model, e.g. `model.layers.0.self_attn.q_proj`; of a bare parameter its own name, e.g.
            `model.layers.0.mlp.experts.down_proj`.
        a: A in the file, [E·r, in]; for embeddings [r, tokens].
        b: B in the file, [out, E·r]; for embeddings [width, r].
        scaling: α/r, or α/√r.
        embedding: the module is an embedding.
        experts: E of a bare parameter, 0 for a module's matrix.
        stored: the base's name for the matrix, if it is not the module's.
        parts: the base's tensors that hold it one after another, if each expert has its own.
    """

    module: str
    a: TensorInfo
    b: TensorInfo
    scaling: float
    embedding: bool = False
    experts: int = 0
    stored: str = ""
    parts: tuple[str, ...] = ()

    @property
    def rank(self) -> int:
        """Return r."""
        return self.a.shape[0] // max(1, self.experts)

    @property
    def tensor(self) -> str:
        """Return the name of the matrix in the base's checkpoint."""
        return self.stored or (self.module if self.experts else f"{self.module}.weight")

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the matrix's shape: [out, in], of several experts [E, out, in], for embeddings [tokens, width]."""
        out, columns = self.b.shape[0], self.a.shape[1]
        if self.experts > 1:
            return (self.experts, out, columns)
        return (columns, out) if self.embedding else (out, columns)


@dataclass(frozen=True)
class TokenRows:
    """Rows that replace those of an embedding: the tensor in the file, [n, width], and their n tokens."""

    info: TensorInfo
    tokens: tuple[int, ...]


def refuse_pair(factors: Mapping[str, TensorInfo], rank: int, bare: bool) -> str:
    """Return why the factors of one module or `bare` parameter are refused, or ""."""
    if set(factors) not in ({"A", "B"}, {"AE", "BE"}) or (bare and "AE" in factors):
        return "A or B is missing, or there are two of them"
    a, b = (factors[name] for name in sorted(factors))
    if not a.elements or not b.elements:
        return f"A has shape {a.shape}, B {b.shape}: {EMPTY}"
    if len(a.shape) != 2 or len(b.shape) != 2:
        return f"A has shape {a.shape}, B {b.shape}: {NO_MATRICES}"
    if not a.dtype.floating or not b.dtype.floating:
        return f"A is of type {a.dtype.torch}, B of {b.dtype.torch}: weights are floating-point numbers"
    if a.shape[0] != b.shape[1]:
        return f"A has shape {a.shape}, B {b.shape}: B·A does not exist"
    if bare and a.shape[0] % rank == 0:
        return ""
    return "" if a.shape[0] == rank else f"A has rank {a.shape[0]}, {ADAPTER_CONFIG} says {rank}"


def refuse_rows(rows: TokenRows) -> str:
    """Return why the rows for some tokens are refused, or ""."""
    shape, tokens = rows.info.shape, rows.tokens
    if not rows.info.dtype.floating or len(shape) != 2 or shape[0] != len(tokens):
        return f"the rows have shape {shape}, {ADAPTER_CONFIG} names {len(tokens)} tokens (trainable_token_indices)"
    return "" if len(set(tokens)) == len(tokens) else "trainable_token_indices names a token twice"

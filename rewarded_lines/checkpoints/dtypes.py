"""The number types of safetensors files, and their storage in memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class DType:
    """One type of number.

    `storage` is the numpy type of the bytes. numpy has no bfloat16: its storage is uint16. The storage of float16 is
    int16, so that kernels can distinguish the two.
    """

    name: str
    torch: str
    storage: np.dtype[Any]
    floating: bool = False

    @property
    def itemsize(self) -> int:
        """Return the bytes of one value."""
        return self.storage.itemsize


F64 = DType("F64", "float64", np.dtype("<f8"), floating=True)
F32 = DType("F32", "float32", np.dtype("<f4"), floating=True)
F16 = DType("F16", "float16", np.dtype("<i2"), floating=True)
BF16 = DType("BF16", "bfloat16", np.dtype("<u2"), floating=True)
DTYPES: Mapping[str, DType] = {
    kind.name: kind
    for kind in (
        F64,
        F32,
        F16,
        BF16,
        DType("I64", "int64", np.dtype("<i8")),
        DType("I32", "int32", np.dtype("<i4")),
        DType("I16", "int16", np.dtype("<i2")),
        DType("I8", "int8", np.dtype("i1")),
        DType("U64", "uint64", np.dtype("<u8")),
        DType("U32", "uint32", np.dtype("<u4")),
        DType("U16", "uint16", np.dtype("<u2")),
        DType("U8", "uint8", np.dtype("u1")),
        DType("BOOL", "bool", np.dtype("?")),
    )
}
FLOATS: Mapping[str, DType] = {kind.torch: kind for kind in (F64, F32, F16, BF16)}


def widest(kinds: Iterable[DType]) -> DType:
    """Return the narrowest floating-point type that holds all values of these types."""
    found = set(kinds)
    if len(found) == 1:
        return found.pop()
    return F64 if F64 in found else F32


def as_torch(values: np.ndarray[Any, Any], dtype: DType) -> Any:
    """Return stored values as a torch tensor of their type, sharing memory."""
    import torch

    kind = getattr(torch, dtype.torch)
    return torch.from_numpy(values).view(kind) if values.dtype != np.bool_ else torch.from_numpy(values)


def as_float64(stored: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return stored floating-point values as float64, exactly; for small arrays only, since it is slow.

    Their storage determines the type: of the floating-point types, uint16 is bfloat16's alone, and int16 float16's.
    """
    if stored.dtype == BF16.storage:
        return (stored.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)
    return (stored.view(np.float16) if stored.dtype == F16.storage else stored).astype(np.float64)

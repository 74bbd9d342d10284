"""torch's arithmetic beside the compiled kernels: one rounding, the same bits, equal infinities."""

import numpy as np
import pytest
import torch
from exact import BFLOAT16, FLOAT16, FLOAT32, decode, encode

from rewarded_lines.checkpoints.dtypes import FLOATS, as_torch
from rewarded_lines.kernels import numpy_kernels
from rewarded_lines.kernels.tensor_merge import TensorMerge
from rewarded_lines.kernels.torch_kernels import cast, merge_values, rounded
from rewarded_lines.merger.merge_rules import soup

FORMATS = pytest.mark.parametrize("format_", [BFLOAT16, FLOAT16, FLOAT32], ids=lambda format_: format_.name)


def hard_values(format_):
    """Return numbers of a format, midpoints, quarters, their float64 neighbours, and patterns at random."""
    codes = np.arange(format_.infinity, step=7 if format_.bits == 16 else 79193, dtype=np.uint32)
    here = decode(codes, format_)
    step = decode(codes | 1, format_) - decode(codes & ~np.uint32(1), format_)
    values = np.concatenate([here, here + step / 2, here + step / 4]).astype(np.float64)
    # Beside a tie by less than float32 can hold, and by the least that float64 can.
    values = np.concatenate([values, np.nextafter(values, np.inf), np.nextafter(values, 0), values * (1 + 2.0**-40)])
    random = np.random.default_rng(1).integers(0, 1 << 64, 30_000, dtype=np.uint64).view(np.float64)
    ends = [0.0, 5e-324, 2.0**-150, 2.0**-149 * 0.75, 65519.999, 65520.0, 3.4e38, 1.7e308, np.inf]
    values = np.concatenate([values, random[~np.isnan(random)], ends])
    return np.concatenate([values, -values])


@FORMATS
def test_one_rounding(format_):
    values = hard_values(format_)
    dtype = FLOATS[format_.name]
    expected = np.empty(values.size, dtype.storage)
    bad = numpy_kernels.cast(values, expected)
    found, count = cast(torch.from_numpy(values), getattr(torch, dtype.torch))
    assert count == bad and torch.equal(found.view(torch.uint8), as_torch(expected, dtype).view(torch.uint8))


def test_torchs_own_cast_would_be_wrong():
    """The case that the odd rounding is for: just above a tie, by less than float32 sees."""
    value = torch.tensor([1 + 2.0**-8 + 2.0**-40], dtype=torch.float64)
    assert value.to(torch.bfloat16).item() == 1 and rounded(value, torch.bfloat16).item() == 1 + 2.0**-7


@FORMATS
def test_every_nan_is_one_pattern(format_):
    patterns = np.array([0x7FF8000000000000, 0xFFF8000000000000, 0x7FF0000000000001, 0xFFFFFFFFFFFFFFFF], np.uint64)
    dtype = FLOATS[format_.name]
    expected = np.empty(4, dtype.storage)
    bad = numpy_kernels.cast(patterns.view(np.float64), expected)
    found, count = cast(torch.from_numpy(patterns.view(np.float64)), getattr(torch, dtype.torch))
    assert count == bad == 4 and torch.equal(found.view(torch.uint8), as_torch(expected, dtype).view(torch.uint8))


@FORMATS
def test_the_linear_kernel(format_):
    generator, dtype = np.random.default_rng(4), FLOATS[format_.name]
    stored = encode(generator.normal(0, 1, (4, 3000)).ravel(), format_).view(dtype.storage).reshape(4, 3000)
    infinite = encode(np.array([np.inf, -np.inf]), format_).view(dtype.storage)
    weights, scale, rows = (0.3, -0.7, 1.9), 1.234, (2, 0, 1)
    for kind in ("finite", "equal infinities", "others, too"):
        if kind == "equal infinities":
            stored[:, ::7] = infinite[generator.integers(0, 2, 429)]
        if kind == "others, too":
            stored[2, 1::11] = infinite[0]
        out = np.empty(3000, dtype.storage)
        with np.errstate(all="ignore"):
            chosen = [stored[row + 1] for row in rows]
            count = numpy_kernels.linear(stored[0], chosen, np.array(weights) * scale, out)
        step = TensorMerge(dtype, None, rows, weights, scale, soup, True)
        base, *policies = (as_torch(row, dtype) for row in stored)
        values, bad = merge_values(step, base, policies, alike=True)
        expected = as_torch(out, dtype)
        assert bad == count and (bad > 0) == (kind != "finite")
        assert torch.equal(values.view(torch.uint8), expected.view(torch.uint8))

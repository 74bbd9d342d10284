"""Merge rules on tensors: hand-computed values, one rounding, exact copies."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rewarded_lines.merging.methods import compute_dtype, copied_policy, merge_block, soup


def test_soup_by_hand():
    residuals = [torch.tensor([1.0, -2.0]), torch.tensor([3.0, 4.0])]
    assert soup(residuals, [0.25, 0.75]).tolist() == [2.5, 2.5]
    assert residuals[0].tolist() == [1.0, -2.0]


def test_merge_block_by_hand():
    base, first, second = torch.tensor([1.0]), torch.tensor([2.0]), torch.tensor([5.0])
    merged = merge_block(base, [first, second], [0.5, 0.5], 2.0, soup, torch.float32)
    assert merged.tolist() == [1 + 2 * (0.5 * 1 + 0.5 * 4)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_one_rounding_to_nearest_even(dtype):
    generator = torch.Generator().manual_seed(0)
    base, first, second = (torch.randn(4096, generator=generator).to(dtype) for _ in range(3))
    wide = [tensor.double() for tensor in (base, first, second)]
    terms = [0.3 * (wide[1] - wide[0]), 0.7 * (wide[2] - wide[0])]
    exact = wide[0] + 1.5 * (terms[0] + terms[1])
    merged = merge_block(base, [first, second], [0.3, 0.7], 1.5, soup, dtype)
    rounded = exact.to(dtype)
    # Where they differ, the exact value lies on a tie between the two, as near as the wider arithmetic can tell.
    tie = (merged.double() + rounded.double()) / 2
    size = wide[0].abs() + 1.5 * (terms[0].abs() + terms[1].abs())
    assert ((merged == rounded) | ((exact - tie).abs() <= size * 2**-21)).all()
    assert (merged != rounded).float().mean() < (1e-9 if dtype == torch.float32 else 0.01)


@given(st.lists(st.floats(-8, 8, width=16), min_size=3, max_size=3), st.floats(0, 1), st.floats(-2, 2))
def test_merge_is_linear_in_the_scale(values, weight, scale):
    base, first, second = (torch.tensor([value], dtype=torch.float64) for value in values)
    merged = merge_block(base, [first, second], [weight, 1 - weight], scale, soup, torch.float64)
    unit = merge_block(base, [first, second], [weight, 1 - weight], 1.0, soup, torch.float64)
    assert torch.allclose(merged - base, scale * (unit - base), atol=1e-12)


def test_compute_one_precision_up():
    assert compute_dtype([torch.bfloat16, torch.float16]) == torch.float32
    assert compute_dtype([torch.bfloat16, torch.float32]) == torch.float64


@pytest.mark.parametrize(
    ("weights", "scale", "index"),
    [
        ((1.0, 0.0), 1.0, 0),
        ((0.0, 1.0), 1.0, 1),
        ((0.5, 0.0), 2.0, 0),
        ((0.5, 0.5), 2.0, None),
        ((1.0, 0.0), 1.5, None),
    ],
)
def test_where_a_policy_is_copied(weights, scale, index):
    assert copied_policy(weights, scale) == index

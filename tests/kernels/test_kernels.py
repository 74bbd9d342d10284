"""The loops over values against integers and fractions: every pattern widened, every tie rounded, tails of chunks."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
from exact import BFLOAT16, FLOAT16, FLOAT32, LONG, decode, encode, encode_fraction

from rewarded_lines.checkpoints.dtypes import FLOATS
from rewarded_lines.kernels import machine_kernels, numpy_kernels
from rewarded_lines.kernels.rule_programs import programs
from rewarded_lines.kernels.tensor_merge import TensorMerge
from rewarded_lines.merger.merge_rules import soup

FORMATS = pytest.mark.parametrize("format_", [BFLOAT16, FLOAT16, FLOAT32], ids=lambda format_: format_.name)
SIXTEEN = pytest.mark.parametrize("format_", [BFLOAT16, FLOAT16], ids=lambda format_: format_.name)


@pytest.fixture(params=[machine_kernels, numpy_kernels], ids=["machine", "numpy"], autouse=True)
def kernels(request, monkeypatch):
    """Run every test with both implementations."""
    monkeypatch.setitem(globals(), "kernels", request.param)


# Around the width of a vector, below it, and none at all.
LENGTHS = [0, 1, 2, 3, 7, 8, 9, 17, 511, 512, 513, 2100]


def storage(format_):
    return FLOATS[format_.name].storage


def cast(values, dtype):
    out = np.empty(values.size, dtype)
    return out, kernels.cast(values, out)


def rounded(values, format_):
    """Cast float64 values; return the bit patterns and how many are not finite."""
    out, bad = cast(np.ascontiguousarray(values, np.float64), storage(format_))
    return out.view(format_.unsigned), bad


# ---- widening ---------------------------------------------------------------------------------------------------


@SIXTEEN
def test_every_pattern_is_widened_exactly(format_):
    codes = np.arange(1 << 16, dtype=np.uint16)
    wide, bad = cast(codes.view(storage(format_)), np.float64)
    expected = decode(codes, format_).astype(np.float64)
    assert np.array_equal(np.isnan(wide), np.isnan(expected)) and bad == (~np.isfinite(expected)).sum() > 0
    known = ~np.isnan(expected)
    assert np.array_equal(wide[known].view(np.uint64), expected[known].view(np.uint64))
    assert kernels.count_nonfinite(codes.view(storage(format_))) == bad


@SIXTEEN
def test_every_pattern_survives_the_way_there_and_back(format_):
    codes = np.arange(1 << 16, dtype=np.uint16)
    back, bad = rounded(cast(codes.view(storage(format_)), np.float64)[0], format_)
    magnitude = codes & 0x7FFF
    number = magnitude <= format_.infinity
    assert np.array_equal(back[number], codes[number])
    assert ((back[~number] & 0x7FFF) > format_.infinity).all()
    assert bad == (magnitude >= format_.infinity).sum()


def test_numpy_and_torch_read_the_patterns_alike():
    import torch

    codes = np.arange(1 << 16, dtype=np.uint16)
    half = cast(codes.view(np.int16), np.float64)[0]
    brain = cast(codes, np.float64)[0]
    np.testing.assert_array_equal(half, codes.view(np.float16).astype(np.float64))
    np.testing.assert_array_equal(brain, torch.from_numpy(codes).view(torch.bfloat16).double().numpy())


# ---- rounding ---------------------------------------------------------------------------------------------------


def finite_codes(format_, seed=0):
    """Return every finite magnitude of 16 bits; of float32, a sample with the ends of every exponent."""
    if format_.bits == 16:
        return np.arange(format_.infinity, dtype=np.uint32)
    sample = np.random.default_rng(seed).integers(0, format_.infinity, 60_000, dtype=np.uint32)
    mantissas = np.array([0, 1, 2, (1 << 23) - 2, (1 << 23) - 1], np.uint32)
    ends = (np.arange(255, dtype=np.uint32)[:, None] << 23) + mantissas
    return np.concatenate([sample, ends.ravel()])


def around_ties(format_):
    """Return each number, the midpoint to the next, and the float64 neighbours of both, of both signs."""
    codes = finite_codes(format_)
    here = decode(codes, format_)
    step = decode(codes | 1, format_) - decode(codes & ~np.uint32(1), format_)
    values = np.concatenate([here, here + step / 2, here + step / 4, here + 3 * step / 4]).astype(np.float64)
    values = np.concatenate([values, np.nextafter(values, np.inf), np.nextafter(values, 0)])
    return np.concatenate([values, -values])


@FORMATS
def test_ties_and_their_neighbours(format_):
    values = around_ties(format_)
    codes, bad = rounded(values, format_)
    expected = encode(values, format_)
    assert np.array_equal(codes, expected)
    largest = (1 << (format_.bits - 1)) - 1
    assert bad == ((expected & largest) == format_.infinity).sum() > 0


@FORMATS
def test_random_float64_patterns(format_):
    patterns = np.random.default_rng(1).integers(0, 1 << 64, 200_000, dtype=np.uint64)
    values = patterns.view(np.float64)
    values = values[~np.isnan(values)]
    # Most of all float64 are too large or too small: the same mantissas where the format has numbers, too.
    low, high = format_.lowest - format_.precision - 2, -format_.lowest + 4
    exponents = np.random.default_rng(2).integers(low, high, values.size)
    inside = np.ldexp(np.frexp(values)[0], exponents.astype(np.int32))
    for sample in (values, inside):
        assert np.array_equal(rounded(sample, format_)[0], encode(sample, format_))


@FORMATS
def test_the_reference_itself_by_fractions(format_):
    values = around_ties(format_)
    values = values[np.random.default_rng(3).integers(0, values.size, 1500)]
    values = values[values != 0]
    assert encode(values, format_).tolist() == [encode_fraction(Fraction(value), format_) for value in values.tolist()]


@FORMATS
def test_ends_of_the_range(format_):
    below, largest = decode(np.array([format_.infinity - 2, format_.infinity - 1]), format_).astype(np.float64)
    over = largest + (largest - below) / 2
    smallest = 2.0 ** (format_.lowest - format_.precision + 1)
    cases = {
        largest: format_.infinity - 1,
        np.nextafter(over, 0): format_.infinity - 1,
        over: format_.infinity,
        2.0**979: format_.infinity,
        1.7e308: format_.infinity,
        np.inf: format_.infinity,
        smallest: 1,
        smallest / 2: 0,
        np.nextafter(smallest / 2, 1): 1,
        smallest * 1.5: 2,
        smallest * 2.5: 2,
        5e-324: 0,
        0.0: 0,
    }
    sign = 1 << (format_.bits - 1)
    values = np.array(list(cases))
    assert rounded(values, format_)[0].tolist() == list(cases.values())
    assert rounded(-values, format_)[0].tolist() == [code | sign for code in cases.values()]
    nan, bad = rounded(np.array([np.nan, -np.nan, 1.0]), format_)
    assert bad == 2 and ((nan[:2] & (sign - 1)) > format_.infinity).all()


def test_float64_is_stored_as_it_is():
    values = np.array([1.0, -0.0, np.pi, np.inf, -np.inf, np.nan, 5e-324])
    out, bad = cast(values, np.float64)
    assert np.array_equal(out.view(np.uint64), values.view(np.uint64)) and bad == 3


@pytest.mark.parametrize("name", FLOATS)
def test_numbers_that_are_not_finite_are_counted(name):
    dtype = FLOATS[name].storage
    for length in LENGTHS:
        values = np.ones(length)
        values[::3], values[1::7] = np.nan, -np.inf
        stored, bad = cast(values, dtype)
        assert bad == kernels.count_nonfinite(stored) == (~np.isfinite(values)).sum()


# ---- the loops --------------------------------------------------------------------------------------------------


def stored(generator, shape, format_):
    """Return random values of a format, of moderate size, with the float64 that they are."""
    codes = encode(generator.normal(0, 1, shape).ravel(), format_)
    wide = decode(codes, format_).astype(np.float64)
    return codes.view(storage(format_)).reshape(shape), wide.reshape(shape)


def linear(base, policies, rows, weights, outs, target):
    """Fill an output for each row of weights; return how many values are not finite, by machine code None if any is."""
    if kernels is numpy_kernels:
        chosen = [policies[row, : base.size] for row in rows]
        return [numpy_kernels.linear(base, chosen, own, out) for own, out in zip(weights, outs, strict=True)]
    steps = [TensorMerge(FLOATS[target.name], None, tuple(rows), tuple(own), rule=soup, linear=True) for own in weights]
    (program,) = programs(steps, [base.dtype] * (1 + len(policies)))
    sources = [base, *(policy[: base.size] for policy in policies)]
    return [0] * len(outs) if program.loop.run(sources, program.parameters, outs) else None


@pytest.mark.parametrize("target", [BFLOAT16, FLOAT16, FLOAT32], ids=lambda format_: format_.name)
@FORMATS
def test_linear(format_, target):
    generator = np.random.default_rng(4)
    weights = np.array([0.3, -0.7, 1.9, 0.25])
    for length in LENGTHS:
        base, wide = stored(generator, length, format_)
        policies, others = stored(generator, (5, length + 9), format_)
        for rows in ([0], [3, 1], [4, 0, 2, 1]):
            factors = weights[: len(rows)]
            total = np.zeros(length)
            for row, factor in zip(rows, factors, strict=True):
                total += (others[row, :length] - wide) * factor
            # A second output, whose factors are twice those of the first, must not disturb it.
            out = np.full((2, length + 1), 77, storage(target))
            assert linear(base, policies, rows, [factors, 2 * factors], out[:, :length], target) == [0, 0]
            for k in range(2):
                assert np.array_equal(out[k, :length].view(target.unsigned), encode(wide + (k + 1) * total, target))
            assert (out[:, length] == 77).all()


@FORMATS
def test_what_is_not_finite_is_counted_or_told(format_):
    one, infinite = encode(np.array([1.0, np.inf]), format_).tolist()
    for length in LENGTHS[1:]:
        for name, place in itertools.product(("base", "policy"), (0, length // 2, length - 1)):
            codes = np.full((3, length), one, format_.unsigned)
            codes[0 if name == "base" else 2, place] = infinite + bool(place)
            base, *policies = codes.view(storage(format_))
            out = np.empty((1, length), np.float32)
            found = linear(base, np.array(policies), [0, 1], [[0.5, 0.25]], out, FLOAT32)
            assert found == (None if kernels is machine_kernels else [1]), (length, name, place)
            # Also where no output needs the policy.
            found = linear(base, np.array(policies), [0], [[0.5]], out, FLOAT32)
            assert found == (None if kernels is machine_kernels else [int(name == "base")]), (length, name, place)


def test_what_may_not_be_finite_in_the_output_is_told():
    for target, value in ((BFLOAT16, 3.39e38), (FLOAT16, 65519.0), (FLOAT16, 65520.0), (FLOAT32, 3.4028236e38)):
        base, policies = np.zeros(9), np.zeros((1, 9))
        policies[0, 8] = value
        out = np.empty((1, 9), storage(target))
        if kernels is machine_kernels:
            assert linear(base, policies, [0], [[1.0]], out, target) is None
        else:
            bad = (encode(np.array([value]), target) == target.infinity).sum()
            assert linear(base, policies, [0], [[1.0]], out, target) == [bad]


@FORMATS
def test_a_value_that_is_equal_everywhere_stays(format_):
    """Inf − inf is NaN; of equal values it is no change."""
    generator = np.random.default_rng(6)
    for length in LENGTHS[1:]:
        base, wide = stored(generator, length, format_)
        policies = np.stack([stored(generator, length, format_)[0] for _ in range(3)])
        expected, args = np.empty((1, length), base.dtype), ([0, 2, 1], [[0.5, 0.25, 0.75]])
        linear(base, policies, *args, expected, format_)
        infinite = encode(np.array([np.inf, -np.inf]), format_).view(base.dtype)
        for place, value in zip(range(0, length, 7), np.resize(infinite, length), strict=False):
            base[place], policies[:, place], expected[:, place] = value, value, value
        if kernels is numpy_kernels:
            out = np.empty_like(expected)
            assert linear(base, policies, *args, out, format_) == [len(range(0, length, 7))]
            assert np.array_equal(out, expected)
        residual = np.empty(length)
        kernels.residual(base, policies[0], residual)
        assert np.isfinite(residual).all() and (residual[::7] == 0).all()


@FORMATS
def test_residual(format_):
    generator = np.random.default_rng(5)
    for length in LENGTHS:
        base, wide = stored(generator, length, format_)
        policy, other = stored(generator, length, FLOAT32)
        out = np.full(length + 1, 7.0)
        kernels.residual(base, policy, out[:length])
        assert np.array_equal(out[:length], other - wide) and out[length] == 7.0


@pytest.mark.parametrize("rank", [1, 3, 16])
def test_product(rank):
    generator = np.random.default_rng(6)
    left, right = generator.normal(size=(7, rank)), generator.normal(size=(rank, 11))
    whole = np.zeros((7, 11))
    for k in range(rank):
        whole += np.outer(left[:, k], right[k])
    flat = whole.ravel() * 0.37
    for start, length in [(0, 77), (0, 1), (5, 0), (3, 30), (10, 1), (76, 1), (21, 23), (11, 11)]:
        out = np.full(length + 1, 7.0)
        kernels.product(left, right, 0.37, start, out[:length])
        assert np.allclose(out[:length], flat[start : start + length], rtol=1e-15, atol=0), (start, length)
        assert out[length] == 7.0
        # The same values wherever a block begins.
        again = np.empty(77)
        kernels.product(left, right, 0.37, 0, again)
        assert np.array_equal(out[:length], again[start : start + length])
    wide, out = generator.normal(size=(rank, 1100)), np.empty(2000)
    kernels.product(left, wide, -2.0, 150, out)
    assert np.allclose(out, -2.0 * (left @ wide).ravel()[150:2150], rtol=1e-12, atol=1e-14)


def test_count_magnitudes():
    generator = np.random.default_rng(7)
    values = np.concatenate([generator.normal(size=1001), [0.0, -0.0, np.inf, 5e-324, -1.0, 1.0]])
    patterns = np.abs(values).view(np.uint64)
    for shift, bits in ((47, 16), (31, 16), (0, 15)):
        prefix = int(patterns[3]) >> (shift + bits)
        counts = np.zeros(1 << bits, np.int64)
        counts[5] = 1
        kernels.count_magnitudes(values, prefix, shift, bits, counts)
        counts[5] -= 1
        chosen = patterns[(patterns >> np.uint64(shift + bits)) == prefix]
        digits = (chosen >> np.uint64(shift)) & np.uint64((1 << bits) - 1)
        assert np.array_equal(counts, np.bincount(digits.astype(np.int64), minlength=1 << bits))


def test_long_doubles_are_wider_than_float64():
    assert np.finfo(LONG).nmant > np.finfo(np.float64).nmant

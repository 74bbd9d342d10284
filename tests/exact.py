"""Rounding and merging in higher precision than the library's own: the reference that tests of exactness share.

Numbers are numpy's long double (64 bits of mantissa here); rounding is done on integers. Nothing of the library is
used, so that nothing of it can hide here.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np

LONG = np.longdouble
WIDE_ENOUGH = np.finfo(LONG).nmant >= 63


@dataclass(frozen=True)
class Format:
    """A binary floating-point format: bits of precision, the hidden one included, and the smallest normal exponent."""

    name: str
    safetensors: str
    bits: int
    precision: int
    lowest: int

    @property
    def unsigned(self):
        return {16: np.uint16, 32: np.uint32, 64: np.uint64}[self.bits]

    @property
    def infinity(self) -> int:
        """Return the code of +inf; finite magnitudes have smaller codes, NaN larger ones."""
        exponents = self.bits - self.precision
        return ((1 << exponents) - 1) << (self.precision - 1)


BFLOAT16 = Format("bfloat16", "BF16", 16, 8, -126)
FLOAT16 = Format("float16", "F16", 16, 11, -14)
FLOAT32 = Format("float32", "F32", 32, 24, -126)
FORMATS = {format_.name: format_ for format_ in (BFLOAT16, FLOAT16, FLOAT32)}


def decode(codes, format_: Format):
    """Return the values of bit patterns as long doubles, from their fields; NaN where they are none."""
    codes = np.asarray(codes, format_.unsigned).astype(np.int64)
    sign = np.where(codes >> (format_.bits - 1), -1, 1)
    magnitude = codes & ((1 << (format_.bits - 1)) - 1)
    field = magnitude >> (format_.precision - 1)
    mantissa = magnitude & ((1 << (format_.precision - 1)) - 1)
    whole = np.where(field > 0, mantissa + (1 << (format_.precision - 1)), mantissa)
    step = np.maximum(field, 1) - 1 + format_.lowest - format_.precision + 1
    values = np.copysign(np.ldexp(whole.astype(LONG), step.astype(np.int32)), sign)
    values[magnitude == format_.infinity] = np.inf * sign[magnitude == format_.infinity]
    values[magnitude > format_.infinity] = np.nan
    return values


def encode(values, format_: Format):
    """Return the bit patterns of numbers that are not NaN, rounded to nearest, ties to even."""
    values = np.asarray(values, LONG)
    finite = np.isfinite(values) & (values != 0)
    fraction, exponent = np.frexp(np.where(finite, np.abs(values), LONG(1)))
    mantissa = np.ldexp(fraction, 64).astype(np.uint64)  # the value is mantissa · 2^(exponent − 64), exactly
    step = np.maximum(exponent - format_.precision, format_.lowest - format_.precision + 1)
    shift = step - (exponent - 64)
    # At 64 the mantissa itself is what is left over; beyond, it is below half a step.
    small, all_left = shift > 64, shift == 64
    shift = np.minimum(shift, 63).astype(np.uint64)
    one = np.uint64(1)
    whole = np.where(all_left, 0, mantissa >> shift)
    rest = np.where(all_left, mantissa, mantissa & ((one << shift) - one))
    half = np.where(all_left, one << np.uint64(63), (one << shift) >> one)
    up = ~small & ((rest > half) | ((rest == half) & (whole & one == 1)))
    whole = np.where(small, 0, whole.astype(np.int64) + up)
    rank = (step - (format_.lowest - format_.precision + 1)).astype(np.int64)
    code = np.where(whole > 0, (rank << (format_.precision - 1)) + whole, 0)
    code = np.where(finite, np.minimum(code, format_.infinity), np.where(values == 0, 0, format_.infinity))
    return (code | (np.signbit(values).astype(np.int64) << (format_.bits - 1))).astype(format_.unsigned)


def encode_fraction(value: Fraction, format_: Format) -> int:
    """Return the bit pattern of a fraction, by exact comparison with its neighbours; the slow way."""
    low, high = 0, format_.infinity  # the code of infinity stands for the number that would come next

    def number(code: int) -> Fraction:
        field, mantissa = code >> (format_.precision - 1), code & ((1 << (format_.precision - 1)) - 1)
        whole = mantissa + (1 << (format_.precision - 1)) if field else mantissa
        return whole * Fraction(2) ** (format_.lowest - format_.precision + max(field, 1))

    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if number(middle) <= abs(value) else (low, middle)
    below, above = abs(value) - number(low), number(high) - abs(value)
    code = high if above < below or (above == below and high % 2 == 0) else low
    return code | ((value < 0) << (format_.bits - 1))


def ulp(values, format_: Format):
    """Return the distance between the format's numbers around each value, as long doubles."""
    _, exponent = np.frexp(np.abs(np.asarray(values, LONG)))
    step = np.maximum(exponent - format_.precision, format_.lowest - format_.precision + 1)
    return np.ldexp(LONG(1), step.astype(np.int32))


def from_tie(values, format_: Format):
    """Return how far each value lies from the nearest midpoint of two neighbours."""
    unit = ulp(values, format_)
    scaled = np.abs(np.asarray(values, LONG)) / unit
    return np.abs(scaled - np.floor(scaled) - LONG(0.5)) * unit

"""Vectors of values in LLVM: loaded as they are stored, widened to float64, rounded to what is stored."""

from __future__ import annotations

from typing import Any

from llvmlite import ir

# Values that an operation takes at a time.
LANES = 8
EXPONENT, SIGN = 0x7FF << 52, 1 << 63
BITS, HALF, SHORT, BYTE = ir.IntType(64), ir.IntType(32), ir.IntType(16), ir.IntType(8)
SINGLE, REAL = ir.FloatType(), ir.DoubleType()
WORDS = {"uint16": SHORT, "int16": SHORT, "float32": HALF, "float64": BITS}
"""The storage types that loops read and write."""
INFINITE = {"uint16": 0x7F80, "int16": 0x7C00, "float32": 0x7F800000, "float64": EXPONENT}
# Larger exponents of a float64 may be infinite in the type.
LARGEST = {"uint16": 1023 + 126, "int16": 1023 + 14, "float32": 1023 + 126, "float64": 1023 + 1023}
# The least exponent of a normal number in a type of 16 bits; and what makes of an exponent the number 1.5·2⁵²·ulp.
_ROUNDING = {
    "uint16": ((1023 - 126) << 52, (45 << 52) | (1 << 51)),
    "int16": ((1023 - 14) << 52, (42 << 52) | (1 << 51)),
}
# Of a loop: the addresses of the sources' addresses, of the parameters and of the targets' addresses; how many outputs;
# how many values; at which value of the targets the first goes; and which value of its tensor that is.
SIGNATURE = ir.FunctionType(BITS, [BITS] * 7)


def vector(kind: Any) -> Any:
    """Return the type of a vector."""
    return ir.VectorType(kind, LANES)


def every(kind: Any, value: float) -> Any:
    """Return a vector of one number."""
    return ir.Constant(vector(kind), [value] * LANES)


def place_of(builder: ir.IRBuilder, array: Any, index: Any, kind: Any) -> Any:
    """Return a pointer to a number of an array, which is an address."""
    return builder.gep(builder.inttoptr(array, kind.as_pointer()), [index])


def item(builder: ir.IRBuilder, array: Any, index: Any, kind: Any = BITS) -> Any:
    """Return a number of an array."""
    return builder.load(place_of(builder, array, index, kind))


def vector_place(builder: ir.IRBuilder, array: Any, index: Any, kind: Any) -> Any:
    """Return a pointer to a vector whose first number is one of an array's."""
    return builder.bitcast(place_of(builder, array, index, kind), vector(kind).as_pointer())


def larger(builder: ir.IRBuilder, one: Any, other: Any) -> Any:
    """Return the larger of two whole numbers without a sign."""
    return builder.select(builder.icmp_unsigned(">", one, other), one, other)


def known(builder: ir.IRBuilder, name: str, made: Any, *given: Any) -> Any:
    """Return one of LLVM's own functions."""
    return builder.module.globals.get(name) or ir.Function(builder.module, ir.FunctionType(made, given), name)


def loaded(builder: ir.IRBuilder, array: Any, index: Any, kind: str) -> Any:
    """Return a vector of stored values."""
    word = WORDS[kind]
    return builder.load(vector_place(builder, array, index, word), align=word.width // 8)


def widened(builder: ir.IRBuilder, stored: Any, kind: str) -> Any:
    """Return stored values as float64."""
    if kind == "float64":
        return builder.bitcast(stored, vector(REAL))
    if kind == "float32":
        return builder.fpext(builder.bitcast(stored, vector(SINGLE)), vector(REAL))
    half = builder.shl(builder.zext(stored, vector(HALF)), every(HALF, 16))
    if kind == "uint16":
        return builder.fpext(builder.bitcast(half, vector(SINGLE)), vector(REAL))
    # As a float32, exponent and mantissa of a float16 are 2¹¹² too small, of subnormal values, too.
    size = builder.lshr(builder.and_(half, every(HALF, 0x7FFF0000)), every(HALF, 3))
    sign = builder.and_(half, every(HALF, 0x80000000))
    small = builder.fpext(builder.bitcast(builder.or_(size, sign), vector(SINGLE)), vector(REAL))
    return builder.fmul(small, every(REAL, 2.0**112))


def rounded(builder: ir.IRBuilder, value: Any, kind: str) -> tuple[Any, Any]:
    """Return float64 values as they are stored, rounded once; and their exponents."""
    bits = builder.bitcast(value, vector(BITS))
    exponent = builder.and_(bits, every(BITS, EXPONENT))
    if kind == "float64":
        return bits, exponent
    if kind == "float32":
        return builder.bitcast(builder.fptrunc(value, vector(SINGLE)), vector(HALF)), exponent
    # Adding and subtracting 1.5·2⁵²·ulp rounds to a multiple of ulp, ties to even, in a single rounding.
    least, magic = _ROUNDING[kind]
    raised = builder.bitcast(
        builder.add(larger(builder, exponent, every(BITS, least)), every(BITS, magic)), vector(REAL)
    )
    near = builder.fsub(builder.fadd(value, raised), raised)
    if kind == "int16":
        near = builder.fmul(near, every(REAL, 2.0**-112))
    single = builder.bitcast(builder.fptrunc(near, vector(SINGLE)), vector(HALF))
    # A float16 has three bits of exponent less than a float32.
    shift = 16 if kind == "uint16" else 13
    codes = builder.trunc(builder.lshr(single, every(HALF, shift)), vector(SHORT))
    # A sum with a positive number loses the sign of a zero: put it back.
    sign = builder.trunc(builder.lshr(bits, every(BITS, 48)), vector(SHORT))
    return builder.or_(codes, builder.and_(sign, every(SHORT, 0x8000))), exponent


def quotient(builder: ir.IRBuilder, left: Any, right: Any, inverse: Any) -> Any:
    """Return the quotient of whole numbers below 2³², by the inverse: the bits of a division in a third of its time.

    The remainder of the first quotient is exact, so that the second one is the nearest number.

    Source: Markstein, Computation of elementary functions on the IBM RISC System/6000 processor, IBM Journal of
    Research and Development 34(1), 1990, doi 10.1147/rd.341.0111.
    """
    kind = vector(REAL)
    fused = known(builder, f"llvm.fma.v{LANES}f64", kind, kind, kind, kind)
    near = builder.fmul(left, inverse)
    rest = builder.call(fused, [builder.fneg(near), right, left])
    return builder.call(fused, [rest, inverse, near])

"""Weighted sums as machine code, without numba: several outputs in one pass, each input widened once.

LLVM translates the loop within some hundredths of a second, and loading numba takes ten times as long. The operations
and their order are those of `compiled_kernels.linear`, so the bits are the same.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import numpy as np
from llvmlite import binding, ir

from rewarded_lines.kernels.compiled_files import PIECE, write_files

Array = np.ndarray[Any, Any]

__all__ = ["LARGEST", "PIECE", "addresses", "linear", "machine_code", "supports"]
# Values that an operation takes at a time.
LANES = 8
WIDEST = ",-prefer-256-bit"
# Larger exponents of a float64 may be infinite in the output's type.
LARGEST = (1023 + 126) << 52
_EXPONENT, _SIGN = 0x7FF << 52, 1 << 63
# The least exponent of a normal number in bfloat16; and what makes of an exponent the number 1.5·2⁵²·ulp.
_NORMAL, _MAGIC = (1023 - 126) << 52, (45 << 52) | (1 << 51)
_BITS, _INDEX, _HALF, _SHORT = ir.IntType(64), ir.IntType(64), ir.IntType(32), ir.IntType(16)
_SINGLE, _REAL = ir.FloatType(), ir.DoubleType()
_STORED = {"uint16": _SHORT, "float32": _SINGLE}
_ITEMS = {"uint16": 2, "float32": 4}
# Of a loop: the addresses of the sources' addresses, the weights and the targets' addresses; how many outputs; from
# which value of the sources to which; and how much later the first one's place in the targets is.
SIGNATURE = ir.FunctionType(_BITS, [_INDEX] * 7)
_engines: list[Any] = []


def supports(stored: np.dtype[Any], wanted: np.dtype[Any]) -> bool:
    """Return whether there is a loop from one storage type to another: bfloat16 and float32."""
    return stored.name in _STORED and wanted.name in _STORED


def linear(base: Array, policies: Sequence[Array], weights: Array, out: Array) -> bool:
    """Write base + Σ_j w_kj·(policy_j − base) for every output k; return False if a result may not be finite.

    After False, the values in `out` mean nothing.

    Args:
        base: n stored values.
        policies: n stored values each, of the same type.
        weights: [outputs, policies] factors times the schedule's scale.
        out: [outputs, ≥ n] values of the outputs' storage type.
    """
    sources, targets = (addresses(rows) for rows in ((base, *policies), out))
    factors = np.ascontiguousarray(weights, np.float64)
    loop = machine_code(len(policies), base.dtype.name, out.dtype.name)["whole"]
    places = sources.ctypes.data, factors.ctypes.data, targets.ctypes.data
    return bool(loop(*places, len(out), 0, base.size, 0) <= LARGEST)


def addresses(rows: Iterable[Array]) -> Array:
    """Return where arrays without gaps begin in memory."""
    return np.array([row.ctypes.data for row in rows], np.int64)


def cpu_features() -> str:
    """Return the processor's features, for LLVM. Where vectors have 512 bits, it may use all of them.

    Other processors do not have that setting: LLVM would warn of it each time.
    """
    features = binding.get_host_cpu_features()
    own: str = features.flatten()
    return own + WIDEST if features.get("avx512f") else own


@cache
def machine_code(policies: int, stored: str, wanted: str) -> dict[str, Any]:
    """Return the functions for a number of policies and two storage types, by name: "whole" and "files"."""
    module = ir.Module()
    loops = []
    for lanes in (LANES, 1):
        loops.append(ir.Function(module, SIGNATURE, f"sums{lanes}"))
        _Writer(loops[-1], lanes, stored, wanted).write(policies)
    whole = _write_whole(ir.Function(module, SIGNATURE, "whole"), loops)
    signature = write_files(module, whole, policies, *(_ITEMS[name] for name in (stored, wanted)))
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    host = binding.get_host_cpu_name(), cpu_features()
    target = binding.Target.from_default_triple().create_target_machine(*host, opt=3)
    engine = binding.create_mcjit_compiler(binding.parse_assembly(str(module)), target)
    engine.finalize_object()
    # The engine owns the code.
    _engines.append(engine)
    kinds = {"whole": len(SIGNATURE.args), "files": len(signature.args)}
    return {
        name: ctypes.CFUNCTYPE(ctypes.c_uint64, *[ctypes.c_int64] * count)(engine.get_function_address(name))
        for name, count in kinds.items()
    }


def _write_whole(function: Any, loops: Sequence[Any]) -> Any:
    """Write the function that calls the wide loop, and then the narrow one for the rest; return it."""
    builder = ir.IRBuilder(function.append_basic_block())
    *given, first, last, shift = function.args
    length = builder.sub(last, first)
    middle = builder.sub(last, builder.urem(length, _INDEX(LANES)))
    largest = builder.call(loops[0], [*given, first, middle, shift])
    rest = builder.call(loops[1], [*given, middle, last, shift])
    builder.ret(builder.select(builder.icmp_unsigned(">", rest, largest), rest, largest))
    return function


class _Writer:
    """Writes one function: a loop over the values, and in it a loop over the outputs."""

    def __init__(self, function: Any, lanes: int, stored: str, wanted: str) -> None:
        self._function, self._lanes = function, lanes
        self._stored, self._wanted = _STORED[stored], _STORED[wanted]
        self._builder = ir.IRBuilder(function.append_basic_block())
        sources, weights, targets, self._outputs, self._first, self._last, self._shift = function.args
        self._sources = self._builder.inttoptr(sources, _INDEX.as_pointer())
        self._weights = self._builder.inttoptr(weights, _REAL.as_pointer())
        self._targets = self._builder.inttoptr(targets, _INDEX.as_pointer())

    def _vector(self, kind: Any) -> Any:
        return ir.VectorType(kind, self._lanes)

    def _all(self, kind: Any, value: int) -> Any:
        return ir.Constant(self._vector(kind), [value] * self._lanes)

    def write(self, policies: int) -> None:
        """Write both loops; the function returns the largest exponent."""
        builder, entry = self._builder, self._builder.block
        rows = [self._row(self._sources, _INDEX(row), self._stored) for row in range(policies + 1)]
        values, outputs, following, end, nothing = (self._function.append_basic_block() for _ in range(5))
        builder.cbranch(builder.icmp_signed("<", self._first, self._last), values, nothing)
        ir.IRBuilder(nothing).ret(_BITS(0))
        builder.position_at_end(values)
        place, before = builder.phi(_INDEX), builder.phi(self._vector(_BITS))
        origin, *others = (self._widened(row, place) for row in rows)
        residuals = [builder.fsub(other, origin) for other in others]
        builder.branch(outputs)
        builder.position_at_end(outputs)
        output, largest = builder.phi(_INDEX), builder.phi(self._vector(_BITS))
        total = builder.fadd(origin, self._joined(residuals, output))
        target = self._row(self._targets, output, self._wanted)
        now = self._kept(target, builder.add(place, self._shift), total, largest)
        further, next_place = builder.add(output, _INDEX(1)), builder.add(place, _INDEX(self._lanes))
        builder.cbranch(builder.icmp_signed("<", further, self._outputs), outputs, following)
        builder.position_at_end(following)
        builder.cbranch(builder.icmp_signed("<", next_place, self._last), values, end)
        for phi, first, again, block, inner in (
            (place, self._first, next_place, following, entry),
            (before, self._all(_BITS, 0), now, following, entry),
            (output, _INDEX(0), further, outputs, values),
            (largest, before, now, outputs, values),
        ):
            phi.add_incoming(first, inner)
            phi.add_incoming(again, block)
        builder.position_at_end(end)
        if self._lanes == 1:
            builder.ret(builder.extract_element(now, _HALF(0)))
            return
        name, kind = f"llvm.vector.reduce.umax.v{self._lanes}i64", ir.FunctionType(_BITS, [self._vector(_BITS)])
        builder.ret(builder.call(ir.Function(self._function.module, kind, name), [now]))

    def _joined(self, residuals: Sequence[Any], output: Any) -> Any:
        """Return Σ_j w_kj·τ_j, summed in order."""
        builder, total = self._builder, None
        for policy, residual in enumerate(residuals):
            place = builder.add(builder.mul(output, _INDEX(len(residuals))), _INDEX(policy))
            number = builder.load(builder.gep(self._weights, [place]))
            first = builder.insert_element(ir.Constant(self._vector(_REAL), ir.Undefined), number, _HALF(0))
            weight = builder.shuffle_vector(first, first, ir.Constant(self._vector(_HALF), None))
            term = builder.fmul(residual, weight)
            total = term if total is None else builder.fadd(total, term)
        return total

    def _row(self, rows: Any, index: Any, kind: Any) -> Any:
        return self._builder.inttoptr(self._builder.load(self._builder.gep(rows, [index])), kind.as_pointer())

    def _at(self, row: Any, place: Any, kind: Any) -> Any:
        return self._builder.bitcast(self._builder.gep(row, [place]), self._vector(kind).as_pointer())

    def _widened(self, row: Any, place: Any) -> Any:
        builder = self._builder
        if self._stored is _SINGLE:
            return builder.fpext(builder.load(self._at(row, place, _SINGLE), align=4), self._vector(_REAL))
        short = builder.load(self._at(row, place, _SHORT), align=2)
        bits = builder.shl(builder.zext(short, self._vector(_HALF)), self._all(_HALF, 16))
        return builder.fpext(builder.bitcast(bits, self._vector(_SINGLE)), self._vector(_REAL))

    def _kept(self, row: Any, place: Any, total: Any, largest: Any) -> Any:
        """Round and store sums; return the largest exponents so far."""
        builder = self._builder
        bits = builder.bitcast(total, self._vector(_BITS))
        exponent = builder.and_(bits, self._all(_BITS, _EXPONENT))
        if self._wanted is _SINGLE:
            builder.store(builder.fptrunc(total, self._vector(_SINGLE)), self._at(row, place, _SINGLE), align=4)
        else:
            # Adding and subtracting 1.5·2⁵²·ulp rounds to a multiple of ulp, as in `compiled_kernels`.
            raised = builder.add(self._larger(exponent, self._all(_BITS, _NORMAL)), self._all(_BITS, _MAGIC))
            magic = builder.bitcast(raised, self._vector(_REAL))
            rounded = builder.bitcast(builder.fsub(builder.fadd(total, magic), magic), self._vector(_BITS))
            # A sum with a positive number loses the sign of a zero: put it back.
            signed = builder.or_(rounded, builder.and_(bits, self._all(_BITS, _SIGN)))
            single = builder.fptrunc(builder.bitcast(signed, self._vector(_REAL)), self._vector(_SINGLE))
            upper = builder.lshr(builder.bitcast(single, self._vector(_HALF)), self._all(_HALF, 16))
            builder.store(builder.trunc(upper, self._vector(_SHORT)), self._at(row, place, _SHORT), align=2)
        return self._larger(exponent, largest)

    def _larger(self, one: Any, other: Any) -> Any:
        return self._builder.select(self._builder.icmp_unsigned(">", one, other), one, other)

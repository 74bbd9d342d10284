"""Rules as machine code: a chunk's residuals are computed, joined by all operations of a rule, and rounded once.

LLVM translates a rule's operations within some hundredths of a second, into one loop whose intermediate values stay in
the processor's registers. It neither joins nor reorders operations, so the bits are numpy's.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import types
from numba.extending import intrinsic

from rewarded_lines.kernels.compiled_kernels import Array, _store, _widen, compiled
from rewarded_lines.kernels.rule_programs import Operation

# Values of a chunk; the rows of its buffers begin in different sets of the cache.
_CHUNK, _WIDTH = 512, 520
# Values that an operation takes at a time; with more, most processors run out of registers.
_LANES = 4
_REAL, _INDEX, _NUMBER = ir.DoubleType(), ir.IntType(64), ir.IntType(32)
_REALS, _BYTES = ir.VectorType(_REAL, _LANES), ir.VectorType(ir.IntType(8), _LANES)
_SIGNATURE = ir.FunctionType(ir.VoidType(), [_INDEX] * 5)
_engines: list[Any] = []


@intrinsic  # type: ignore[untyped-decorator]
def _call(_: Any, address: Any, residuals: Any, masks: Any, constants: Any, merged: Any, count: Any) -> Any:
    """Call machine code at an address."""

    def write(context: Any, builder: Any, _: Any, given: Any) -> Any:
        builder.call(builder.inttoptr(given[0], _SIGNATURE.as_pointer()), given[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6), write


@compiled
def merge_by_rules(
    base: Array,
    policies: Array,
    address: int,
    rows: Array,
    constants: Array,
    masks: Array,
    scales: Array,
    out: Array,
    counts: Array,
    first: int,
    given: bool,
    bare: bool,
) -> None:
    """Write base + s_k·m_k for every output k, with m_k its rule's residual; count results that are not finite.

    Args:
        base: n stored values.
        policies: [N, ≥ first + n] stored values; or float64 residuals, if `given`.
        address: of the rules' machine code.
        rows: the policies that it takes.
        constants: its constants.
        masks: its masks, boolean or float64 [masks, n].
        scales: s_k.
        out: [outputs, ≥ n] values of the outputs' storage type.
        counts: [outputs] the numbers of results that are not finite are added here.
        first: where the policies' values that belong to `base` begin.
        given: whether `policies` are residuals.
        bare: whether `out` takes s_k·m_k alone.
    """
    origin, residuals = np.empty(_CHUNK), np.empty((rows.size, _WIDTH))
    kept, merged = np.empty((masks.shape[0], _WIDTH), masks.dtype), np.empty((scales.size, _WIDTH))
    for start in range(0, base.size, _CHUNK):
        # Slices: the compiler vectorizes loops whose indices start at 0.
        source = base[start : start + _CHUNK]
        for i in range(source.size):
            origin[i] = _widen(source[i])
        for j in range(rows.size):
            _take(policies[rows[j], first + start : first + start + source.size], origin, given, residuals[j])
        if bare:
            # Adding −0 changes no number; adding 0 would change −0.
            origin[:] = -0.0
        for j in range(masks.shape[0]):
            kept[j, : source.size] = masks[j, start : start + _CHUNK]
        _call(address, residuals.ctypes.data, kept.ctypes.data, constants.ctypes.data, merged.ctypes.data, source.size)
        for k in range(scales.size):
            target, joined, scale, count = out[k, start : start + _CHUNK], merged[k], scales[k], 0
            for i in range(source.size):
                count += _store(target, i, origin[i] + scale * joined[i])
            counts[k] += count


@compiled
def _take(policy: Array, origin: Array, given: bool, residual: Array) -> None:
    """Write the residual of a chunk: `policy` itself if it is `given`."""
    if given:
        for i in range(policy.size):
            residual[i] = _widen(policy[i])
    else:
        for i in range(policy.size):
            value = _widen(policy[i])
            # Inf − inf would be NaN.
            residual[i] = value - origin[i] if value != origin[i] else 0.0


@cache
def machine_code(operations: tuple[Operation, ...]) -> int:
    """Return the address of a compiled rule, for `merge_by_rules`."""
    module = ir.Module()
    _Writer(ir.Function(module, _SIGNATURE, "rule")).write(operations)
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    features = binding.get_host_cpu_features().flatten()
    target = binding.Target.from_default_triple().create_target_machine(binding.get_host_cpu_name(), features, opt=3)
    engine = binding.create_mcjit_compiler(binding.parse_assembly(str(module)), target)
    engine.finalize_object()
    # The engine owns the code.
    _engines.append(engine)
    address: int = engine.get_function_address("rule")
    return address


class _Writer:
    """Writes the loop of one function, which goes on until it has passed the last value of a chunk."""

    def __init__(self, function: ir.Function) -> None:
        self._blocks = [function.append_basic_block() for _ in range(3)]
        self._builder = ir.IRBuilder(self._blocks[0])
        # Masks are booleans, or numbers.
        places = {"residual": 0, "mask": 1, "factor": 1, "constant": 2, "result": 3}
        self._rows = {
            kind: self._builder.inttoptr(
                function.args[place], (ir.IntType(8) if kind == "mask" else _REAL).as_pointer()
            )
            for kind, place in places.items()
        }
        self._count = function.args[4]
        self._size = ir.Function(function.module, ir.FunctionType(_REALS, [_REALS]), f"llvm.fabs.v{_LANES}f64")
        self._values: dict[int, Any] = {}

    def write(self, operations: tuple[Operation, ...]) -> None:
        """Write all operations, constants in front of the loop."""
        builder, (entry, loop, end) = self._builder, self._blocks
        for place, operation in enumerate(operations):
            if operation.kind == "constant":
                self._values[place] = self._everywhere(operation.operands[0])
        builder.branch(loop)
        builder.position_at_end(loop)
        self._start = builder.phi(_INDEX)
        for place, operation in enumerate(operations):
            if operation.kind == "result":
                index, value = operation.operands
                builder.store(self._real(value), self._at("result", index, _REALS), align=8)
            elif operation.kind != "constant":
                self._values[place] = self._value(operation)
        following = builder.add(self._start, _INDEX(_LANES))
        self._start.add_incoming(_INDEX(0), entry)
        self._start.add_incoming(following, loop)
        builder.cbranch(builder.icmp_signed("<", following, self._count), loop, end)
        ir.IRBuilder(end).ret_void()

    def _value(self, operation: Operation) -> Any:
        builder, kind, operands = self._builder, operation.kind, operation.operands
        if kind in ("residual", "factor"):
            return builder.load(self._at(kind, operands[0], _REALS), align=8)
        if kind == "mask":
            drawn = builder.load(self._at(kind, operands[0], _BYTES), align=1)
            return builder.icmp_unsigned("!=", drawn, ir.Constant(_BYTES, None))
        if kind == "fabs":
            return builder.call(self._size, [self._real(operands[0])])
        if kind in ("and_", "or_"):
            return getattr(builder, kind)(*(self._values[operand] for operand in operands))
        left, right = map(self._real, operands)
        known = getattr(builder, kind, None)
        return known(left, right) if known else builder.fcmp_ordered(kind, left, right)

    def _at(self, rows: str, row: int, kind: Any) -> Any:
        """Return the place of a row's next values."""
        place = self._builder.add(self._start, _INDEX(row * _WIDTH))
        return self._builder.bitcast(self._builder.gep(self._rows[rows], [place]), kind.as_pointer())

    def _everywhere(self, index: int) -> Any:
        """Return a vector of one constant."""
        number = self._builder.load(self._builder.gep(self._rows["constant"], [_INDEX(index)]))
        first = self._builder.insert_element(ir.Constant(_REALS, ir.Undefined), number, _NUMBER(0))
        return self._builder.shuffle_vector(first, first, ir.Constant(ir.VectorType(_NUMBER, _LANES), None))

    def _real(self, place: int) -> Any:
        """Return a value as numbers: 1 where it is true, 0 where it is false."""
        value = self._values[place]
        if value.type == _REALS:
            return value
        ones, zeros = (ir.Constant(_REALS, [number] * _LANES) for number in (1.0, 0.0))
        return self._builder.select(value, ones, zeros)

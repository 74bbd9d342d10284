"""Programs of rules as machine code: all operations on a few values in the processor's registers, then the next ones.

LLVM translates a program within some hundredths of a second. It neither joins nor reorders operations, so the bits are
numpy's.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

from llvmlite import binding, ir

from rewarded_lines.kernels.rule_programs import Operation

# Values that an operation takes at a time; more would not fit the registers of most processors.
LANES = 4
_REAL, _INDEX = ir.DoubleType(), ir.IntType(64)
_REALS, _BYTES = ir.VectorType(_REAL, LANES), ir.VectorType(ir.IntType(8), LANES)


@cache
def machine_code(operations: tuple[Operation, ...], width: int) -> Callable[..., None]:
    """Return a compiled program: its arguments are addresses of the inputs' and the outputs' rows, and n.

    Residuals and outputs are float64 [rows, width], masks boolean [masks, width], constants float64. It computes the
    first n values of each row, and some more to a multiple of `LANES`.
    """
    module = ir.Module()
    kinds = [_REAL.as_pointer(), ir.IntType(8).as_pointer(), _REAL.as_pointer(), _REAL.as_pointer(), _INDEX]
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), kinds), "rule")
    _write_loop(function, operations, width)
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    features = binding.get_host_cpu_features().flatten()
    target = binding.Target.from_default_triple().create_target_machine(binding.get_host_cpu_name(), features, opt=3)
    engine = binding.create_mcjit_compiler(binding.parse_assembly(str(module)), target)
    engine.finalize_object()
    code = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 4, ctypes.c_int64)(engine.get_function_address("rule"))
    # The engine owns the code.
    code.engine = engine  # type: ignore[attr-defined]
    return code


def _write_loop(function: ir.Function, operations: tuple[Operation, ...], width: int) -> None:
    residuals, masks, constants, outputs, count = function.args
    entry, loop, end = (function.append_basic_block() for _ in range(3))
    builder = ir.IRBuilder(entry)
    size = ir.Function(function.module, ir.FunctionType(_REALS, [_REALS]), f"llvm.fabs.v{LANES}f64")
    values: dict[int, ir.Value] = {}
    ones, zeros = (ir.Constant(_REALS, [number] * LANES) for number in (1.0, 0.0))

    def reals(value: ir.Value) -> ir.Value:
        return value if value.type == _REALS else builder.select(value, ones, zeros)

    for place, operation in enumerate(operations):
        if operation.kind == "constant":
            number = builder.load(builder.gep(constants, [_INDEX(operation.operands[0])]))
            single = builder.insert_element(ir.Constant(_REALS, ir.Undefined), number, ir.IntType(32)(0))
            first = ir.Constant(ir.VectorType(ir.IntType(32), LANES), None)
            values[place] = builder.shuffle_vector(single, single, first)
    builder.branch(loop)
    builder.position_at_end(loop)
    start = builder.phi(_INDEX)
    start.add_incoming(_INDEX(0), entry)

    def at(rows: ir.Value, row: int, kind: ir.Type) -> ir.Value:
        place = builder.gep(rows, [builder.add(start, _INDEX(row * width))])
        return builder.bitcast(place, kind.as_pointer())

    for place, (kind, operands, _) in enumerate(operations):
        if kind == "residual":
            values[place] = builder.load(at(residuals, operands[0], _REALS), align=8)
        elif kind == "mask":
            drawn = builder.load(at(masks, operands[0], _BYTES), align=1)
            values[place] = builder.icmp_unsigned("!=", drawn, ir.Constant(_BYTES, None))
        elif kind == "result":
            builder.store(reals(values[operands[1]]), at(outputs, operands[0], _REALS), align=8)
        elif kind == "fabs":
            values[place] = builder.call(size, [values[operands[0]]])
        elif kind in ("and_", "or_"):
            values[place] = getattr(builder, kind)(*(values[operand] for operand in operands))
        elif kind != "constant":
            left, right = (reals(values[operand]) for operand in operands)
            known = getattr(builder, kind, None)
            values[place] = known(left, right) if known else builder.fcmp_ordered(kind, left, right)
    following = builder.add(start, _INDEX(LANES))
    start.add_incoming(following, loop)
    builder.cbranch(builder.icmp_unsigned("<", following, count), loop, end)
    ir.IRBuilder(end).ret_void()

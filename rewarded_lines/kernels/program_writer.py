"""Writes the loop of a program for LLVM: values are widened, pass all operations in registers, and are rounded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from llvmlite import ir

from rewarded_lines.kernels.philox import Philox
from rewarded_lines.kernels.rule_programs import RANKS, Operation

# Values that an operation takes at a time.
LANES = 8
_EXPONENT, _SIGN = 0x7FF << 52, 1 << 63
_BITS, _INDEX, _HALF, _SHORT, _BYTE = ir.IntType(64), ir.IntType(64), ir.IntType(32), ir.IntType(16), ir.IntType(8)
_SINGLE, _REAL = ir.FloatType(), ir.DoubleType()
_WORDS = {"uint16": _SHORT, "int16": _SHORT, "float32": _HALF, "float64": _BITS}
_INFINITE = {"uint16": 0x7F80, "int16": 0x7C00, "float32": 0x7F800000, "float64": _EXPONENT}
# Larger exponents of a float64 may be infinite in the type.
_LARGEST = {"uint16": 1023 + 126, "int16": 1023 + 14, "float32": 1023 + 126, "float64": 1023 + 1023}
# The least exponent of a normal number in a type of 16 bits; and what makes of an exponent the number 1.5·2⁵²·ulp.
_ROUNDING = {
    "uint16": ((1023 - 126) << 52, (45 << 52) | (1 << 51)),
    "int16": ((1023 - 14) << 52, (42 << 52) | (1 << 51)),
}
# Of a loop: the addresses of the sources' addresses, of the parameters and of the targets' addresses; how many outputs;
# how many values; at which value of the targets the first goes; and which value of its tensor that is.
SIGNATURE = ir.FunctionType(_BITS, [_INDEX] * 7)
STORED = frozenset(_WORDS)
"""The storage types that loops read and write."""


def _vector(kind: Any) -> Any:
    return ir.VectorType(kind, LANES)


def _all(kind: Any, value: float) -> Any:
    return ir.Constant(_vector(kind), [value] * LANES)


def _around(kind: str) -> Any:
    """Return the type of what goes round in the loops."""
    return _BITS if kind.startswith("count") else _vector(_WORDS.get(kind, _BITS))


class ProgramWriter:
    """Writes one function: a loop over the values, and in it a loop over the outputs.

    Operations that are the same for all outputs are in the outer loop.
    """

    def __init__(self, function: ir.Function, stored: Sequence[str], wanted: str, checked: bool) -> None:
        """Begin a function, see `machine_code.translated`."""
        self._function, self._stored, self._wanted = function, stored, wanted
        self._builder = builder = ir.IRBuilder(function.append_basic_block())
        sources, parameters, targets, self._outputs, self._count, self._shift, self._start = function.args
        self._sources = [self._item(sources, _INDEX(place)) for place in range(len(stored))]
        self._targets = targets
        self._parameters = builder.inttoptr(parameters, _REAL.as_pointer())
        self._values: dict[int, Any] = {}
        # What goes round in both loops: exponents of results, of stored values by their type, and counts.
        self._kept: dict[str, Any] = dict.fromkeys(("result", *(kind for kind in stored if checked and kind != RANKS)))

    def write(self, operations: tuple[Operation, ...]) -> None:
        """Write both loops; the function returns 1 if a value is not finite, else 0."""
        builder, entry = self._builder, self._builder.block
        numbers = max((each.operands[0] + 1 for each in operations if each.kind == "constant"), default=0)
        random = [each.operands[0] for each in operations if each.kind == "random"]
        self._first_factor = numbers + Philox.WORDS * len(random)
        self._each = sum(each.kind == "factor" for each in operations)
        self._results = sum(each.kind == "result" for each in operations)
        for place, each in enumerate(operations):
            if each.kind == "constant":
                self._values[place] = self._everywhere(_INDEX(each.operands[0]))
            elif each.kind == "count":
                self._kept[f"count {each.operands[0]}"] = None
            elif each.kind == "collect":
                self._values[place] = builder.alloca(_INDEX)
                builder.store(_INDEX(0), self._values[place])
        self._random = {place: Philox(builder, self._parameters, numbers + Philox.WORDS * place) for place in random}
        values, outputs, following, end, nothing = (self._function.append_basic_block() for _ in range(5))
        builder.cbranch(builder.icmp_signed("<", _INDEX(0), self._count), values, nothing)
        ir.IRBuilder(nothing).ret(_BITS(0))
        builder.position_at_end(values)
        self._place = builder.phi(_INDEX)
        outer = {kind: builder.phi(_around(kind)) for kind in self._kept}
        self._kept = dict(outer)
        self._loaded = [self._widened(*each) for each in zip(self._stored, self._sources, strict=True)]
        late = _late(operations)
        self._write_all(operations, [place for place in range(len(operations)) if place not in late])
        before = self._kept
        builder.branch(outputs)
        builder.position_at_end(outputs)
        self._output = builder.phi(_INDEX)
        inner = {kind: builder.phi(_around(kind)) for kind in self._kept}
        self._kept = dict(inner)
        self._write_all(operations, sorted(late))
        last = builder.block
        further, next_place = builder.add(self._output, _INDEX(1)), builder.add(self._place, _INDEX(LANES))
        builder.cbranch(builder.icmp_signed("<", further, self._outputs), outputs, following)
        builder.position_at_end(following)
        builder.cbranch(builder.icmp_signed("<", next_place, self._count), values, end)
        loops = [
            (self._place, _INDEX(0), next_place, following, entry),
            (self._output, _INDEX(0), further, last, values),
        ]
        for kind, now in self._kept.items():
            loops.append((outer[kind], ir.Constant(now.type, None), now, following, entry))
            loops.append((inner[kind], before[kind], now, last, values))
        for phi, first, again, block, from_ in loops:
            phi.add_incoming(first, from_)
            phi.add_incoming(again, block)
        builder.position_at_end(end)
        builder.ret(builder.zext(self._doubtful(), _BITS))

    def _doubtful(self) -> Any:
        """Write the counts; return whether an exponent shows that a value may not be finite."""
        builder, found = self._builder, ir.Constant(ir.IntType(1), 0)
        for kind, bits in self._kept.items():
            if kind.startswith("count"):
                row = self._item(self._targets, _INDEX(int(kind.split()[1])))
                builder.store(bits, builder.inttoptr(row, _BITS.as_pointer()))
                continue
            limit = _LARGEST[self._wanted] << 52 if kind == "result" else _INFINITE[kind] - 1
            word = bits.type.element
            reduce = self._known(f"llvm.vector.reduce.umax.v{LANES}i{word.width}", word, bits.type)
            largest = builder.call(reduce, [bits])
            found = builder.or_(found, builder.icmp_unsigned(">", largest, ir.Constant(largest.type, limit)))
        return found

    def _known(self, name: str, made: Any, *given: Any) -> Any:
        """Return one of LLVM's own functions."""
        module = self._function.module
        return module.globals.get(name) or ir.Function(module, ir.FunctionType(made, given), name)

    def _write_all(self, operations: Sequence[Operation], places: Iterable[int]) -> None:
        for place in places:
            operation = operations[place]
            if operation.kind == "collect":
                self._collect(self._values[place], *operation.operands)
            elif operation.kind == "tally":
                self._tally(*operation.operands)
            elif operation.kind != "constant":
                self._values[place] = self._value(operation)

    def _value(self, operation: Operation) -> Any:
        builder, kind, operands = self._builder, operation.kind, operation.operands
        if kind == "source":
            return self._loaded[operands[0]]
        if kind == "factor":
            place = builder.add(builder.mul(self._output, _INDEX(self._each)), _INDEX(self._first_factor + operands[0]))
            return self._everywhere(place)
        if kind == "random":
            return self._random[operands[0]].numbers(builder.add(self._start, self._place))
        if kind == "result":
            return self._store(operands[0], self._real(operands[1]))
        if kind == "count":
            found = builder.ctpop(builder.bitcast(self._values[operands[1]], _BYTE))
            key = f"count {operands[0]}"
            self._kept[key] = builder.add(self._kept[key], builder.zext(found, _BITS))
            return None
        if kind == "fabs":
            size = self._known(f"llvm.fabs.v{LANES}f64", _vector(_REAL), _vector(_REAL))
            return builder.call(size, [self._real(operands[0])])
        if kind in ("and_", "or_"):
            return getattr(builder, kind)(*(self._values[operand] for operand in operands))
        if kind == "single":
            single = builder.fptrunc(self._real(operands[0]), _vector(_SINGLE))
            return builder.fpext(single, _vector(_REAL))
        if kind == "fmul" and (chosen := [each for each in operands if self._values[each].type != _vector(_REAL)]):
            # A number times 0 is a zero of its sign.
            (other,) = [each for each in operands if each != chosen[0]]
            bits = builder.bitcast(self._real(other), _vector(_BITS))
            kept = builder.select(self._values[chosen[0]], bits, builder.and_(bits, _all(_BITS, _SIGN)))
            return builder.bitcast(kept, _vector(_REAL))
        left, right = map(self._real, operands)
        known = getattr(builder, kind, None)
        return known(left, right) if known else builder.fcmp_ordered(kind, left, right)

    def _real(self, place: int) -> Any:
        """Return a value as numbers: 1 where it is true, 0 where it is false."""
        value = self._values[place]
        if value.type == _vector(_REAL):
            return value
        return self._builder.select(value, _all(_REAL, 1.0), _all(_REAL, 0.0))

    def _everywhere(self, place: Any) -> Any:
        """Return a vector of one parameter."""
        builder = self._builder
        number = builder.load(builder.gep(self._parameters, [place]))
        first = builder.insert_element(ir.Constant(_vector(_REAL), ir.Undefined), number, _HALF(0))
        return builder.shuffle_vector(first, first, ir.Constant(_vector(_HALF), None))

    def _item(self, array: Any, index: Any) -> Any:
        """Return a number of an array of such."""
        builder = self._builder
        return builder.load(builder.gep(builder.inttoptr(array, _INDEX.as_pointer()), [index]))

    def _at(self, row: Any, place: Any, kind: Any) -> Any:
        builder = self._builder
        pointer = builder.gep(builder.inttoptr(row, kind.as_pointer()), [place])
        return builder.bitcast(pointer, _vector(kind).as_pointer())

    def _widened(self, kind: str, row: Any) -> Any:
        """Return the next values of a source as float64; note their exponents."""
        builder = self._builder
        if kind == RANKS:
            return builder.uitofp(builder.load(self._at(row, self._place, _HALF), align=4), _vector(_REAL))
        word = _WORDS[kind]
        stored = builder.load(self._at(row, self._place, word), align=word.width // 8)
        if kind in self._kept:
            self._note(kind, builder.and_(stored, _all(word, _INFINITE[kind])))
        if kind == "float64":
            return builder.bitcast(stored, _vector(_REAL))
        if kind == "float32":
            return builder.fpext(builder.bitcast(stored, _vector(_SINGLE)), _vector(_REAL))
        half = builder.shl(builder.zext(stored, _vector(_HALF)), _all(_HALF, 16))
        if kind == "uint16":
            return builder.fpext(builder.bitcast(half, _vector(_SINGLE)), _vector(_REAL))
        # As a float32, exponent and mantissa of a float16 are 2¹¹² too small, of subnormal values, too.
        size = builder.lshr(builder.and_(half, _all(_HALF, 0x7FFF0000)), _all(_HALF, 3))
        sign = builder.and_(half, _all(_HALF, 0x80000000))
        small = builder.fpext(builder.bitcast(builder.or_(size, sign), _vector(_SINGLE)), _vector(_REAL))
        return builder.fmul(small, _all(_REAL, 2.0**112))

    def _store(self, index: int, value: Any) -> Any:
        """Round and store results; note their exponents."""
        builder, kind, word = self._builder, self._wanted, _WORDS[self._wanted]
        bits = builder.bitcast(value, _vector(_BITS))
        exponent = builder.and_(bits, _all(_BITS, _EXPONENT))
        if kind == "float64":
            codes = bits
        elif kind == "float32":
            codes = builder.bitcast(builder.fptrunc(value, _vector(_SINGLE)), _vector(_HALF))
        else:
            # Adding and subtracting 1.5·2⁵²·ulp rounds to a multiple of ulp, ties to even, in a single rounding.
            least, magic = _ROUNDING[kind]
            raised = builder.bitcast(
                builder.add(self._larger(exponent, _all(_BITS, least)), _all(_BITS, magic)), _vector(_REAL)
            )
            rounded = builder.fsub(builder.fadd(value, raised), raised)
            if kind == "int16":
                rounded = builder.fmul(rounded, _all(_REAL, 2.0**-112))
            single = builder.bitcast(builder.fptrunc(rounded, _vector(_SINGLE)), _vector(_HALF))
            # A float16 has three bits of exponent less than a float32.
            shift = 16 if kind == "uint16" else 13
            codes = builder.trunc(builder.lshr(single, _all(_HALF, shift)), _vector(_SHORT))
            # A sum with a positive number loses the sign of a zero: put it back.
            sign = builder.trunc(builder.lshr(bits, _all(_BITS, 48)), _vector(_SHORT))
            codes = builder.or_(codes, builder.and_(sign, _all(_SHORT, 0x8000)))
        row = builder.add(builder.mul(self._output, _INDEX(self._results)), _INDEX(index))
        target = self._item(self._targets, row)
        place = builder.add(self._place, self._shift)
        builder.store(codes, self._at(target, place, word), align=word.width // 8)
        self._note("result", exponent)

    def _collect(self, counter: Any, index: int, truth: int, value: int) -> None:
        """Append values to a target where something is true: seldom, so that most steps only ask whether."""
        builder, chosen = self._builder, self._values[truth]
        some = builder.icmp_unsigned("!=", builder.bitcast(chosen, _BYTE), _BYTE(0))
        with builder.if_then(some, likely=False):
            row = builder.inttoptr(self._item(self._targets, _INDEX(index)), _REAL.as_pointer())
            for lane in range(LANES):
                place = builder.load(counter)
                builder.store(builder.extract_element(self._values[value], _HALF(lane)), builder.gep(row, [place]))
                one = builder.zext(builder.extract_element(chosen, _HALF(lane)), _INDEX)
                builder.store(builder.add(place, one), counter)

    def _tally(self, index: int, truth: int, value: int, shift: int, bits: int) -> None:
        """Count values in a table by some bits of their pattern, where something is true."""
        builder = self._builder
        table = builder.inttoptr(self._item(self._targets, _INDEX(index)), _BITS.as_pointer())
        pattern = builder.bitcast(self._values[value], _vector(_BITS))
        digits = builder.and_(builder.lshr(pattern, _all(_BITS, shift)), _all(_BITS, (1 << bits) - 1))
        ones = builder.zext(self._values[truth], _vector(_BITS))
        for lane in range(LANES):
            place = builder.gep(table, [builder.extract_element(digits, _HALF(lane))])
            builder.store(builder.add(builder.load(place), builder.extract_element(ones, _HALF(lane))), place)

    def _note(self, kind: str, bits: Any) -> None:
        self._kept[kind] = self._larger(bits, self._kept[kind])

    def _larger(self, one: Any, other: Any) -> Any:
        return self._builder.select(self._builder.icmp_unsigned(">", one, other), one, other)


def _late(operations: Sequence[Operation]) -> set[int]:
    """Return the places of operations that may differ between outputs."""
    late: set[int] = set()
    for place, (kind, operands, _) in enumerate(operations):
        inputs = () if kind in ("source", "constant", "random", "factor") else operands
        if kind in ("factor", "result", "count", "collect", "tally") or any(operand in late for operand in inputs):
            late.add(place)
    return late

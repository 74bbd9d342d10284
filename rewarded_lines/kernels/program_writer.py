"""Writes the loop of a program for LLVM: values are widened, pass all operations in registers, and are rounded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from llvmlite import binding, ir

from rewarded_lines.kernels.measures import SUMMED
from rewarded_lines.kernels.philox import Philox
from rewarded_lines.kernels.rule_programs import RANKS, Operation
from rewarded_lines.kernels.vectors import (
    BITS,
    BYTE,
    EXPONENT,
    HALF,
    INFINITE,
    LANES,
    LARGEST,
    REAL,
    SIGN,
    SINGLE,
    WORDS,
    every,
    item,
    known,
    larger,
    loaded,
    place_of,
    quotient,
    rounded,
    vector,
    vector_place,
    widened,
)

COMPRESSES = binding.llvm_version_info[0] >= 19


def _around(kind: str) -> Any:
    """Return the type of what goes round in the loops."""
    return vector(REAL if kind.startswith("sum") else WORDS.get(kind, BITS))


class ProgramWriter:
    """Writes one function: a loop over the values, and in it a loop over the outputs.

    Operations that are the same for all outputs are in the outer loop.
    """

    def __init__(self, function: ir.Function, stored: Sequence[str], wanted: str, checked: bool) -> None:
        """Begin a function, see `machine_code.translated`."""
        self._function, self._stored, self._wanted = function, stored, wanted
        self._builder = builder = ir.IRBuilder(function.append_basic_block())
        sources, parameters, targets, self._outputs, self._count, self._shift, self._start = function.args
        self._sources = [item(builder, sources, BITS(place)) for place in range(len(stored))]
        self._targets = targets
        self._parameters = builder.inttoptr(parameters, REAL.as_pointer())
        self._values: dict[int, Any] = {}
        self._inverses: dict[Operation, Any] = {}
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
                self._values[place] = self._everywhere(BITS(each.operands[0]))
            elif each.kind == "factor" and not self._results:
                self._values[place] = self._everywhere(BITS(self._first_factor + each.operands[0]))
            elif each.kind == "fdiv" and self._ranks_by_constant(operations, each):
                self._inverses[each] = builder.fdiv(every(REAL, 1.0), self._values[each.operands[1]])
            elif each.kind == "count":
                self._kept[f"count {each.operands[0]}"] = None
            elif each.kind == "sum":
                self._kept[f"sum {each.operands[0]}"] = None
        self._random = {place: Philox(builder, self._parameters, numbers + Philox.WORDS * place) for place in random}
        values, outputs, following, end, nothing = (self._function.append_basic_block() for _ in range(5))
        builder.cbranch(builder.icmp_signed("<", BITS(0), self._count), values, nothing)
        ir.IRBuilder(nothing).ret(BITS(0))
        builder.position_at_end(values)
        self._place = builder.phi(BITS)
        outer = {kind: builder.phi(_around(kind)) for kind in self._kept}
        self._kept = dict(outer)
        self._loaded = [self._widened(*each) for each in zip(self._stored, self._sources, strict=True)]
        # What counts has no outputs.
        late = _late(operations) if self._results else set()
        self._write_all(operations, [place for place in range(len(operations)) if place not in late])
        before, early = self._kept, builder.block
        builder.branch(outputs)
        builder.position_at_end(outputs)
        self._output = builder.phi(BITS)
        inner = {kind: builder.phi(_around(kind)) for kind in self._kept}
        self._kept = dict(inner)
        self._write_all(operations, sorted(late))
        last = builder.block
        further, next_place = builder.add(self._output, BITS(1)), builder.add(self._place, BITS(LANES))
        builder.cbranch(builder.icmp_signed("<", further, self._outputs), outputs, following)
        builder.position_at_end(following)
        builder.cbranch(builder.icmp_signed("<", next_place, self._count), values, end)
        loops = [
            (self._place, BITS(0), next_place, following, entry),
            (self._output, BITS(0), further, last, early),
        ]
        for kind, now in self._kept.items():
            loops.append((outer[kind], ir.Constant(now.type, None), now, following, entry))
            loops.append((inner[kind], before[kind], now, last, early))
        for phi, first, again, block, from_ in loops:
            phi.add_incoming(first, from_)
            phi.add_incoming(again, block)
        builder.position_at_end(end)
        builder.ret(builder.zext(self._doubtful(), BITS))

    def _doubtful(self) -> Any:
        """Add to the counts; return whether an exponent shows that a value may not be finite."""
        builder, found = self._builder, ir.Constant(ir.IntType(1), 0)
        for kind, bits in self._kept.items():
            if kind.startswith("count"):
                reduce = known(builder, f"llvm.vector.reduce.add.v{LANES}i64", BITS, vector(BITS))
                place = self._counter(kind)
                builder.store(builder.add(builder.load(place), builder.call(reduce, [bits])), place)
                continue
            if kind.startswith("sum"):
                continue
            limit = LARGEST[self._wanted] << 52 if kind == "result" else INFINITE[kind] - 1
            word = bits.type.element
            reduce = known(builder, f"llvm.vector.reduce.umax.v{LANES}i{word.width}", word, bits.type)
            largest = builder.call(reduce, [bits])
            found = builder.or_(found, builder.icmp_unsigned(">", largest, ir.Constant(largest.type, limit)))
        return found

    def _write_all(self, operations: Sequence[Operation], places: Iterable[int]) -> None:
        for place in places:
            operation = operations[place]
            if operation.kind == "collect":
                self._collect(*operation.operands)
            elif operation.kind == "sum":
                self._sum(*operation.operands)
            elif operation.kind == "finite":
                bits = self._builder.bitcast(self._values[operation.operands[0]], vector(BITS))
                self._note("result", self._builder.and_(bits, every(BITS, EXPONENT)))
            elif operation.kind == "tally":
                self._tally(*operation.operands)
            elif operation in self._inverses:
                left, right = map(self._real, operation.operands)
                self._values[place] = quotient(self._builder, left, right, self._inverses[operation])
            elif place not in self._values:
                self._values[place] = self._value(operation)

    def _value(self, operation: Operation) -> Any:
        builder, kind, operands = self._builder, operation.kind, operation.operands
        if kind == "source":
            return self._loaded[operands[0]]
        if kind == "factor":
            place = builder.add(builder.mul(self._output, BITS(self._each)), BITS(self._first_factor + operands[0]))
            return self._everywhere(place)
        if kind == "random":
            return self._random[operands[0]].numbers(builder.add(self._start, self._place))
        if kind == "result":
            return self._store(operands[0], self._real(operands[1]))
        if kind == "count":
            key = f"count {operands[0]}"
            more = builder.add(self._kept[key], every(BITS, 1))
            self._kept[key] = builder.select(self._values[operands[1]], more, self._kept[key])
            return None
        if kind == "fabs":
            size = known(builder, f"llvm.fabs.v{LANES}f64", vector(REAL), vector(REAL))
            return builder.call(size, [self._real(operands[0])])
        if kind in ("and_", "or_"):
            return getattr(builder, kind)(*(self._values[operand] for operand in operands))
        if kind == "single":
            single = builder.fptrunc(self._real(operands[0]), vector(SINGLE))
            return builder.fpext(single, vector(REAL))
        if kind == "fmul" and (chosen := [each for each in operands if self._values[each].type != vector(REAL)]):
            # A number times 0 is a zero of its sign.
            (other,) = [each for each in operands if each != chosen[0]]
            bits = builder.bitcast(self._real(other), vector(BITS))
            kept = builder.select(self._values[chosen[0]], bits, builder.and_(bits, every(BITS, SIGN)))
            return builder.bitcast(kept, vector(REAL))
        left, right = map(self._real, operands)
        write = getattr(builder, kind, None)
        return write(left, right) if write else builder.fcmp_ordered(kind, left, right)

    def _ranks_by_constant(self, operations: Sequence[Operation], quotient: Operation) -> bool:
        left, right = (operations[place] for place in quotient.operands)
        return left.kind == "source" and self._stored[left.operands[0]] == RANKS and right.kind == "constant"

    def _real(self, place: int) -> Any:
        """Return a value as numbers: 1 where it is true, 0 where it is false."""
        value = self._values[place]
        if value.type == vector(REAL):
            return value
        return self._builder.select(value, every(REAL, 1.0), every(REAL, 0.0))

    def _everywhere(self, place: Any) -> Any:
        """Return a vector of one parameter."""
        builder = self._builder
        number = builder.load(builder.gep(self._parameters, [place]))
        first = builder.insert_element(ir.Constant(vector(REAL), ir.Undefined), number, HALF(0))
        return builder.shuffle_vector(first, first, ir.Constant(vector(HALF), None))

    def _widened(self, kind: str, row: Any) -> Any:
        """Return the next values of a source as float64; note their exponents."""
        builder = self._builder
        if kind == RANKS:
            ranks = builder.load(vector_place(builder, row, self._place, HALF), align=4)
            return builder.uitofp(ranks, vector(REAL))
        stored = loaded(builder, row, self._place, kind)
        if kind in self._kept:
            self._note(kind, builder.and_(stored, every(WORDS[kind], INFINITE[kind])))
        return widened(builder, stored, kind)

    def _store(self, index: int, value: Any) -> None:
        """Round and store results; note their exponents."""
        builder, word = self._builder, WORDS[self._wanted]
        codes, exponent = rounded(builder, value, self._wanted)
        row = builder.add(builder.mul(self._output, BITS(self._results)), BITS(index))
        place = builder.add(self._place, self._shift)
        target = vector_place(builder, item(builder, self._targets, row), place, word)
        builder.store(codes, target, align=word.width // 8)
        self._note("result", exponent)

    def _counter(self, kind: str) -> Any:
        """Return a pointer to a count: the first number of a target."""
        row = item(self._builder, self._targets, BITS(int(kind.split()[1])))
        return self._builder.inttoptr(row, BITS.as_pointer())

    def _collect(self, counter: int, index: int, truth: int, value: int) -> None:
        """Append values to a target where something is true, seldom; another target counts them.

        Up to `LANES` values more are written.
        """
        builder, chosen, values = self._builder, self._values[truth], self._values[value]
        bits = builder.bitcast(chosen, BYTE)
        with builder.if_then(builder.icmp_unsigned("!=", bits, BYTE(0)), likely=False):
            place, row = self._counter(f"collect {counter}"), item(builder, self._targets, BITS(index))
            begin = builder.load(place)
            if COMPRESSES:
                name = f"llvm.experimental.vector.compress.v{LANES}f64"
                compress = known(builder, name, vector(REAL), vector(REAL), chosen.type, vector(REAL))
                together = builder.call(compress, [values, chosen, ir.Constant(vector(REAL), ir.Undefined)])
                builder.store(together, vector_place(builder, row, begin, REAL), align=8)
                following = builder.add(begin, builder.zext(builder.ctpop(bits), BITS))
            else:
                following = begin
                for lane in range(LANES):
                    builder.store(builder.extract_element(values, HALF(lane)), place_of(builder, row, following, REAL))
                    one = builder.zext(builder.extract_element(chosen, HALF(lane)), BITS)
                    following = builder.add(following, one)
            builder.store(following, place)

    def _sum(self, index: int, value: int) -> None:
        """Write the sum of each `SUMMED` values, none below 0, in numpy's order: eight sums at a time, then theirs."""
        builder, kind = self._builder, f"sum {index}"
        total = builder.fadd(self._kept[kind], self._real(value))
        done = builder.add(self._place, BITS(LANES))
        last = builder.icmp_unsigned("==", builder.and_(done, BITS(SUMMED - 1)), BITS(0))
        with builder.if_then(last, likely=False):
            parts = [builder.extract_element(total, HALF(lane)) for lane in range(LANES)]
            while len(parts) > 1:
                parts = [builder.fadd(*parts[place : place + 2]) for place in range(0, len(parts), 2)]
            place = builder.udiv(builder.add(self._shift, self._place), BITS(SUMMED))
            builder.store(parts[0], place_of(builder, item(builder, self._targets, BITS(index)), place, REAL))
        self._kept[kind] = builder.select(last, ir.Constant(vector(REAL), None), total)

    def _tally(self, index: int, truth: int, value: int, shift: int, bits: int) -> None:
        """Count values in a table by some bits of their pattern, where something is true."""
        builder = self._builder
        table = builder.inttoptr(item(builder, self._targets, BITS(index)), BITS.as_pointer())
        pattern = builder.bitcast(self._values[value], vector(BITS))
        digits = builder.and_(builder.lshr(pattern, every(BITS, shift)), every(BITS, (1 << bits) - 1))
        ones = builder.zext(self._values[truth], vector(BITS))
        for lane in range(LANES):
            place = builder.gep(table, [builder.extract_element(digits, HALF(lane))])
            builder.store(builder.add(builder.load(place), builder.extract_element(ones, HALF(lane))), place)

    def _note(self, kind: str, bits: Any) -> None:
        self._kept[kind] = larger(self._builder, bits, self._kept[kind])


def _late(operations: Sequence[Operation]) -> set[int]:
    """Return the places of operations that may differ between outputs."""
    late: set[int] = set()
    for place, (kind, operands, _) in enumerate(operations):
        inputs = () if kind in ("source", "constant", "random", "factor") else operands
        if kind in ("factor", "result", "count", "collect", "sum", "tally") or any(
            operand in late for operand in inputs
        ):
            late.add(place)
    return late
